"""Datasets laid end to end: one dataset of several that one tokenizer made."""

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmpipe.data import manifest
from llmpipe.data.indexed import Reader, Writer
from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES
from llmpipe.progress import Progress, progress

log = logging.getLogger(__name__)


def join(sources: list[Path], output: Path) -> None:
    """Join datasets, in the order given, into one; UserError if they were made by different tokenizers."""
    readers = [Reader(source) for source in sources]
    manifests = [manifest.read(source) for source in sources]
    _check_joinable(readers, manifests, output)
    total = sum(len(reader.tokens) for reader in readers)
    with progress("join", total * readers[0].dtype.itemsize, "B") as shown, Writer(output, readers[0].dtype) as writer:
        for reader in readers:
            _copy(reader, writer, shown)
    known = [facts for facts in manifests if facts is not None]
    if len(known) == len(readers):
        manifest.write(output, _joined_facts(known))
    else:
        log.warning("%s gets no manifest: not all of its sources have one", output)


def _check_joinable(readers: list[Reader], manifests: list[dict[str, Any] | None], output: Path) -> None:
    """UserError if the datasets differ in token type or tokenizer, or one would be overwritten."""
    first, first_facts = readers[0], manifests[0]
    for reader, facts in zip(readers, manifests, strict=True):
        if reader.prefix.resolve() == output.resolve():
            raise UserError(f"--output {output} is one of the datasets to join: give it another name")
        if reader.dtype != first.dtype:
            raise UserError(
                f"{reader.prefix} has {reader.dtype} tokens, {first.prefix} has {first.dtype}: only datasets of one"
                " tokenizer can be joined; tokenize them again with one"
            )
        if facts and first_facts and facts["tokenizer"]["sha256"] != first_facts["tokenizer"]["sha256"]:
            raise UserError(
                f"{reader.prefix} was made by the tokenizer {facts['tokenizer']['path']}, {first.prefix} by"
                f" {first_facts['tokenizer']['path']}, which is another one: tokenize them again with one"
            )


def _copy(reader: Reader, writer: Writer, shown: Progress) -> None:
    """Add all documents of a dataset, some megabytes at a time."""
    step = CHUNK_BYTES // reader.dtype.itemsize
    ends = np.searchsorted(reader.starts, np.arange(step, len(reader.tokens) + step, step), "right") - 1
    edges = [0, *sorted({int(end) for end in ends if end > 0}), reader.num_documents]
    for first, last in pairwise(edges):
        sequences, tokens = slice(*reader.documents[[first, last]]), slice(*reader.starts[[first, last]])
        document_ends = reader.documents[first + 1 : last + 1] - reader.documents[first]
        writer.add(reader.tokens[tokens], reader.sizes[sequences], document_ends)
        shown.add((tokens.stop - tokens.start) * reader.dtype.itemsize)


def _joined_facts(known: list[dict[str, Any]]) -> dict[str, Any]:
    """The joined dataset's manifest: the first one's rules, sums of the counts, all sources."""
    facts = {key: known[0][key] for key in ("tokenizer", "bos", "append_eod", "text_key")}
    counts = {key: sum(one[key] for one in known) for key in ("documents", "empty_documents", "tokens")}
    return {**facts, **counts, "sources": [source for one in known for source in one["sources"]]}

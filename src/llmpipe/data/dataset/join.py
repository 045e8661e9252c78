"""Datasets laid end to end: one dataset of several that one tokenizer made."""

import logging
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader, Writer
from llmpipe.data.dataset.join_parts import counts, join_rejects, joined_parts, rules
from llmpipe.data.dataset.manifest import bin_path, idx_path, rejects_path, suffixed
from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES
from llmpipe.progress import Progress, progress

log = logging.getLogger(__name__)


def join(sources: list[Path], output: Path, remove_rejects: bool = False) -> None:
    """Join datasets, in the order given, into one; all parts of one corpus in their own order, as if there were none.

    UserError if they were made by different tokenizers, or if parts are missing or of different corpora.
    `remove_rejects`: the sources' lists of bad rows are removed once the joined one is there.
    """
    manifests = [manifest.read(source) for source in sources]
    if any(facts and "part" in facts for facts in manifests):
        sources, facts = joined_parts(sources, manifests)
    else:
        known = [facts for facts in manifests if facts is not None]
        facts = _joined_facts(known) if len(known) == len(sources) else None
    _check_joinable(sources, manifests, output)
    lay_end_to_end(sources, output)
    join_rejects(sources, output)
    if facts:
        manifest.write(output, facts)
    else:
        log.warning("%s gets no manifest: not all of its sources have one", output)
    for source in sources if remove_rejects else ():
        rejects_path(source).unlink(missing_ok=True)


def lay_end_to_end(sources: list[Path], output: Path) -> None:
    """One dataset of several, and of their roles where they have them; one of them at a time is open."""
    with ExitStack() as stack:
        for suffix in ("", manifest.ROLES) if _has_roles(sources[0]) else ("",):
            prefixes = [suffixed(source, suffix) for source in sources]
            writer = stack.enter_context(Writer(suffixed(output, suffix), Reader(prefixes[0]).dtype))
            total = sum(bin_path(prefix).stat().st_size for prefix in prefixes)
            with progress("join", total, "B") as shown:
                for prefix in prefixes:
                    _copy(Reader(prefix), writer, shown)
        manifest.retire(output)


def _has_roles(prefix: Path) -> bool:
    return idx_path(suffixed(prefix, manifest.ROLES)).is_file()


def _check_joinable(sources: list[Path], manifests: list[dict[str, Any] | None], output: Path) -> None:
    """UserError if the datasets differ in token type or tokenizer, or one would be overwritten."""
    first_dtype, first_facts = Reader(sources[0]).dtype, manifests[0]
    for source, facts in zip(sources, manifests, strict=True):
        if source.resolve() == output.resolve():
            raise UserError(f"--output {output} is one of the datasets to join: give it another name")
        if (dtype := Reader(source).dtype) != first_dtype:
            raise UserError(
                f"{source} has {dtype} tokens, {sources[0]} has {first_dtype}: only datasets of one tokenizer can be"
                " joined; tokenize them again with one"
            )
        if facts and first_facts and facts["tokenizer"]["sha256"] != first_facts["tokenizer"]["sha256"]:
            raise UserError(
                f"{source} was made by the tokenizer {facts['tokenizer']['path']}, {sources[0]} by"
                f" {first_facts['tokenizer']['path']}, which is another one: tokenize them again with one"
            )
        if _has_roles(source) != _has_roles(sources[0]):
            with_roles, without = (source, sources[0]) if _has_roles(source) else (sources[0], source)
            raise UserError(f"{with_roles} has roles (chats), {without} has none: blend them by --data instead")


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
    return {**rules(known[0]), **counts(known), "sources": [source for one in known for source in one["sources"]]}

"""Text to tokens: corpus files through SentencePiece into a dataset, streamed, in the order of the files."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llmpipe.config import Corpus, load
from llmpipe.data import manifest
from llmpipe.data.indexed import Writer, token_dtype
from llmpipe.data.sources import documents, find_files
from llmpipe.data.tokenizer import Tokenizer, open_tokenizer
from llmpipe.errors import UserError
from llmpipe.files import sha256
from llmpipe.progress import Progress, progress

BATCH_BYTES = 4 << 20
log = logging.getLogger(__name__)


def corpus_of(inputs: list[Path], **options: Any) -> Corpus:
    """What to tokenize: a corpus YAML or the inputs themselves; options that are not None go before the YAML's."""
    given = {key: value for key, value in options.items() if value is not None}
    if not any(path.suffix in (".yaml", ".yml") for path in inputs):
        return Corpus(files=[str(path) for path in inputs], **given)
    if len(inputs) > 1:
        raise UserError("a corpus YAML stands alone: name its further files under its files:")
    corpus = load(Corpus, inputs[0])
    try:
        find_files([Path(file) for file in corpus.files])
    except UserError as error:
        raise UserError(f"{inputs[0]}, files: {error} (paths count from the folder you are in)") from error
    return replace(corpus, **given)


def tokenize(corpus: Corpus, tokenizer_path: Path, output: Path, workers: int) -> None:
    """Write the corpus as the dataset `output`, the same bytes for any number of workers (threads)."""
    tokenizer = open_tokenizer(tokenizer_path)
    bos, eod = _marks(corpus, tokenizer)
    files = find_files([Path(file) for file in corpus.files])
    total, empty = sum(path.stat().st_size for path in files), 0
    with progress("tokenize", total, "B") as shown, Writer(output, token_dtype(tokenizer.vocab_size)) as writer:
        for batch in _encoded(_batches(files, corpus.text_key, shown), tokenizer, workers):
            found = [ids for ids in batch if ids]
            empty += len(batch) - len(found)
            sizes = np.fromiter(map(len, found), np.int64, len(found)) + len(bos) + len(eod)
            tokens = chain.from_iterable(chain(bos, ids, eod) for ids in found)
            writer.add(np.fromiter(tokens, writer.dtype, int(sizes.sum())), sizes)
        if not writer.num_documents:
            raise UserError(f"the corpus is empty: no document with text in {', '.join(corpus.files)}")
    if empty:
        log.warning("%d documents have no text and are left out", empty)
    log.info("%s: %d documents, %d tokens", output, writer.num_documents, writer.num_tokens)
    facts = {"bos": bool(bos), "append_eod": bool(eod), "text_key": corpus.text_key, "documents": writer.num_documents}
    facts |= {"empty_documents": empty, "tokens": writer.num_tokens, "sources": [_source(path) for path in files]}
    manifest.write(output, {"tokenizer": _tokenizer_facts(tokenizer), **facts})


def _marks(corpus: Corpus, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens before and after each document; UserError if the tokenizer lacks one that was asked for."""
    wanted = tokenizer.add_bos if corpus.bos is None else corpus.bos
    for asked, token, option in (
        (wanted, tokenizer.bos_id, "--no-bos"),
        (corpus.append_eod, tokenizer.eos_id, "--no-append-eod"),
    ):
        if asked and token < 0:
            name = "BOS" if option == "--no-bos" else "EOS"
            raise UserError(f"{tokenizer.path} has no {name} token to mark documents with: say {option}")
    return [tokenizer.bos_id] * wanted, [tokenizer.eos_id] * corpus.append_eod


def _batches(files: list[Path], text_key: str, shown: Progress) -> Iterator[list[bytes]]:
    """The documents of all files, some megabytes at a time."""
    batch: list[bytes] = []
    size = 0
    for path in files:
        for text in documents(path, text_key, lambda count, name=path.name: shown.add(count, name)):
            batch.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    yield batch


def _encoded(batches: Iterator[list[bytes]], tokenizer: Tokenizer, workers: int) -> Iterator[list[list[int]]]:
    """The ids of each batch, in order; while one is encoded the next is read and the one before written."""
    with ThreadPoolExecutor(1) as encoder:
        pending = None
        for batch in batches:
            following = encoder.submit(tokenizer.encode_batch, batch, workers)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("sha256", "vocab_size", "bos_id", "eos_id")
    return {"path": str(tokenizer.path), **{name: getattr(tokenizer, name) for name in names}}


def _source(path: Path) -> dict[str, Any]:
    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}

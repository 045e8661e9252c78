"""Text to tokens: corpus files through a tokenizer into a dataset, streamed, in the order of the files."""

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from llmpipe.config import Corpus
from llmpipe.data import pieces
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import token_dtype
from llmpipe.data.encoding.encoders import ENCODERS, Encoder, RowEncoder, encode_block
from llmpipe.data.encoding.fast_encoder import fast_encoder
from llmpipe.data.encoding.text_encoder import TextEncoder
from llmpipe.data.encoding.token_rows import TokenEncoder
from llmpipe.data.parts import Part, corpus_key, cut, part_prefix, run_key
from llmpipe.data.readers.block import BLOCK_BYTES, Span, whole
from llmpipe.data.sources import are_json_lines, find_files, first_row
from llmpipe.data.stream import Counts, Stream
from llmpipe.data.tokenizer import Tokenizer, open_tokenizer
from llmpipe.data.workers import Workers
from llmpipe.errors import UserError
from llmpipe.progress import progress

log = logging.getLogger(__name__)


def corpus_of(inputs: list[Path], **options: Any) -> Corpus:
    """What to tokenize: a corpus YAML or the inputs themselves; options that are not None go before the YAML's."""
    given = {key: value for key, value in options.items() if value is not None}
    if not any(path.suffix in (".yaml", ".yml") for path in inputs):
        return Corpus(files=[str(path) for path in inputs], **given)
    from llmpipe.yaml_file import load  # here, because most inputs are no YAML

    if len(inputs) > 1:
        raise UserError("a corpus YAML stands alone: name its further files under its files:")
    corpus = load(Corpus, inputs[0])
    try:
        find_files([Path(file) for file in corpus.files])
    except UserError as error:
        raise UserError(f"{inputs[0]}, files: {error} (paths count from the folder you are in)") from error
    return replace(corpus, **given)


def tokenize(
    corpus: Corpus, tokenizer_path: Path, output: Path, workers: int, part: Part | None = None, own_encoder: bool = True
) -> None:
    """Write the corpus as the dataset `output`, the same bytes for any number of workers.

    Texts are encoded by llmpipe's own encoder, if it knows this kind of tokenizer; else by the tokenizer's library.
    Workers are threads where all of the work is compiled, else processes.
    Of a part alone `output` gets a suffix, and `llmpipe merge` makes one dataset of all parts.
    """
    tokenizer = open_tokenizer(tokenizer_path)
    files = find_files([Path(file) for file in corpus.files])
    encoder = _encoder(corpus, tokenizer, files)
    if own_encoder and isinstance(encoder, TextEncoder):
        encoder.fast = fast_encoder(tokenizer)
    rules = _rules(corpus, tokenizer, encoder)
    key, spans = corpus_key(rules, files), [whole(path) for path in files]
    if part:
        output, spans = part_prefix(output, part), cut(spans, part.count)[part.number - 1]
    total, before = sum(span.stop - span.start for span in spans), run_key(key, spans)

    def check(counts: Counts) -> None:
        if not counts.documents and not part:
            raise UserError(_empty(corpus, counts))
        if run_key(key, spans) != before:
            raise UserError(f"{', '.join(corpus.files)}: a file was changed while it was read; run this again")

    dtype = token_dtype(tokenizer.vocab_size)
    encode = partial(encode_block, encoder, dtype=dtype)
    threads = isinstance(encoder, TextEncoder) and encoder.is_compiled and are_json_lines(files)
    pool = Workers(encode, min(workers, 1 + total // BLOCK_BYTES), threads)
    with pool, progress("tokenize", total, "B") as shown:
        stream = Stream(encoder, dtype, pool, corpus.skip_bad, shown.add)
        counts = pieces.write(stream, spans, output, before[:16], check)
    hashes = manifest.hashes(output, beside=[span.path for span in spans if span.first])
    sources = [_source(span, part is not None, hashes) for span in spans]
    _tell(output, counts)
    facts = {**rules, "tokenizer": tokenizer.facts(), **asdict(counts), "sources": sources}
    if part:
        facts["part"] = {**asdict(part), "corpus": key, "skip_bad": corpus.skip_bad}
    manifest.write(output, facts, hashes)


def _encoder(corpus: Corpus, tokenizer: Tokenizer, files: list[Path]) -> TextEncoder | RowEncoder:
    encoder = ENCODERS[corpus.kind](corpus, tokenizer)
    if isinstance(encoder, TokenEncoder):
        encoder.look_at(first_row(files, encoder.keys, encoder.optional))
    return encoder


def _rules(corpus: Corpus, tokenizer: Tokenizer, encoder: Encoder) -> dict[str, Any]:
    """All but the text that decides the tokens."""
    return {
        "tokenizer": tokenizer.facts() | {"path": ""},
        "corpus_kind": corpus.kind,
        "bos": encoder.bos,
        "append_eod": encoder.append_eod,
        **encoder.facts,
    }


def _empty(corpus: Corpus, counts: Counts) -> str:
    rejected = f"; {counts.rejected_rows} bad rows are left out" if counts.rejected_rows else ""
    if counts.dropped_chats:
        rejected += f"; {counts.dropped_chats} chats, or parts of such, are longer than max_length: raise it"
    return f"the corpus is empty: no document with text in {', '.join(corpus.files)}{rejected}"


def _tell(output: Path, counts: Counts) -> None:
    if counts.empty_documents:
        log.warning("%d documents have no text and are left out", counts.empty_documents)
    if counts.split_chats or counts.dropped_chats:
        log.warning(
            "of chats that are longer than max_length, %d are split at turns, and %d, or parts of such, are left out",
            counts.split_chats, counts.dropped_chats,
        )  # fmt: skip
    if counts.rejected_rows:
        log.warning("%d rows are bad and left out: %s.rejects.jsonl lists them", counts.rejected_rows, output)
    log.info("%s: %d documents, %d tokens", output, counts.documents, counts.tokens)


def _source(span: Span, in_part: bool, hashes: dict[Path, str]) -> dict[str, Any]:
    """A file for the manifest; of several parts that share one, the part that it begins in hashes it."""
    facts: dict[str, Any] = {"path": str(span.path), "bytes": span.size}
    if in_part:
        facts |= {"start": span.start, "stop": span.stop}
    return facts | ({"sha256": hashes[span.path]} if span.first else {})

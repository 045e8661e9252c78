"""What a dataset holds, as text for `llmpipe inspect`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.batches.fit import check_tokenizer
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.statistics import length_ranges
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.files import sha256

BAR_WIDTH = 40
TEXT_WIDTH = 300
MOST_TOKENS = 1200
NO_TOKENIZER = "The tokenizer is not at hand: --tokenizer names it, for text in place of numbers."


def describe(prefix: Path) -> str:
    """Counts, the manifest's facts and the lengths of the documents."""
    reader = Reader(prefix)
    rows = {
        "documents": f"{reader.num_documents:,}{_sequences(reader)}",
        "tokens": f"{len(reader.tokens):,}",
        "stored as": f"{reader.dtype}, {reader.tokens.nbytes:,} bytes",
        **_manifest_rows(manifest.read(prefix)),
    }
    lines = [f"dataset {prefix}", *(f"  {name:<12}{value}" for name, value in rows.items())]
    if reader.num_documents:
        lines += ["", "tokens in a document, and how many documents have so many", *histogram(reader.lengths)]
    return "\n".join(lines)


def _sequences(reader: Reader) -> str:
    """How many sequences the documents have, where that is another number, and how many documents are empty."""
    sequences, empty = len(reader.sizes), int((reader.lengths == 0).sum())
    notes = [f"{sequences:,} sequences"] if sequences != reader.num_documents else []
    notes += [f"{empty:,} without tokens"] if empty else []
    return f" ({', '.join(notes)})" if notes else ""


def _manifest_rows(facts: dict[str, Any] | None) -> dict[str, str]:
    if facts is None:
        return {"manifest": "none: not made by llmpipe, so its tokenizer is not known"}
    tokenizer, empty, bad = facts["tokenizer"], facts["empty_documents"], facts.get("rejected_rows", 0)
    rows = {
        "left out": f"{empty:,} documents without text" + (f", {bad:,} bad rows" if bad else ""),
        **_chat_rows(facts),
        "tokenizer": f"{tokenizer['path']}, {tokenizer['vocab_size']:,} tokens, SHA-256 {tokenizer['sha256']}",
        "BOS": "before each document" if facts["bos"] else "none",
        "EOD": "after each document" if facts["append_eod"] else "none",
        "llmpipe": facts["llmpipe"],
    }
    if part := facts.get("part"):
        rows["part"] = f"{part['number']} of {part['count']} of a corpus, which llmpipe merge makes of all"
    for number, source in enumerate(facts["sources"], start=1):
        rows[f"source {number}"] = _source(source)
    return rows


def _source(source: dict[str, Any]) -> str:
    """A file of the corpus; of one that several parts share, the part that it begins in has the hash."""
    span = f", of which {source['start']:,} to {source['stop']:,}" if "start" in source else ""
    digest = f", SHA-256 {source['sha256']}" if "sha256" in source else ""
    return f"{source['path']}, {source['bytes']:,} bytes{span}{digest}"


def _chat_rows(facts: dict[str, Any]) -> dict[str, str]:
    """What only a dataset of chats has."""
    if facts.get("corpus_kind") != "chat":
        return {}
    rows = {"chats": f"fields {facts['fields'] or 'of a known kind'}, template {facts.get('template', 'none')}"}
    if facts["max_length"]:
        split, dropped = facts["split_chats"], facts["dropped_chats"]
        rows["over long"] = f"more than {facts['max_length']:,} tokens: {split:,} split at turns, {dropped:,} left out"
    return rows


def histogram(lengths: NDArray[np.int64]) -> list[str]:
    """A bar per power of two; the longest bar is the fullest range."""
    ranges = length_ranges(lengths)
    fullest = max(count for _, _, count in ranges)
    return [
        f"  {first:>11,} to {last:>11,}  {count:>11,}  {'#' * -(-BAR_WIDTH * count // fullest)}".rstrip()
        for first, last, count in ranges
    ]


def first_documents(prefix: Path, tokenizer_path: Path | None, count: int) -> str:
    """The beginnings of the first documents: as text, or as numbers where their tokenizer is not at hand.

    UserError if another tokenizer than the one at `tokenizer_path` made them.
    """
    tokenizer, reader = _tokenizer(prefix, tokenizer_path), Reader(prefix)
    lines = [] if tokenizer else [NO_TOKENIZER, ""]
    for number in range(min(count, reader.num_documents)):
        ids = reader.read(number, 0, MOST_TOKENS).astype(np.int64).tolist()
        text = tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids))
        shown = text if len(text) <= TEXT_WIDTH else text[:TEXT_WIDTH] + "…"
        lines += [f"document {number}, {reader.lengths[number]:,} tokens", shown, ""]
    return "\n".join(lines).rstrip()


def _tokenizer(prefix: Path, path: Path | None) -> Tokenizer | None:
    """The tokenizer that is named, or the one that the manifest names if it still lies there."""
    from llmpipe.data.tokenizer import open_tokenizer

    if path:
        tokenizer = open_tokenizer(path)
        check_tokenizer(prefix, tokenizer.path)
        return tokenizer
    facts = manifest.read(prefix)
    own = Path(facts["tokenizer"]["path"]) if facts else None
    if not facts or not own or not own.is_file() or sha256(own) != facts["tokenizer"]["sha256"]:
        return None
    return open_tokenizer(own)

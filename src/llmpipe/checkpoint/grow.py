"""Vocabulary grown for added tokens: new rows in embedding and head, and the tokens in the tokenizer's files.

The ids are those of transformers' add_tokens: from the tokenizer's size on, and a model has max(rows, tokens) rows, as
after its resize_token_embeddings. tokenizer.model stays byte for byte: in text, a token written out stays text.
"""

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import AddedToken, Tokenizer

from llmpipe.checkpoint import tokenizer_files
from llmpipe.checkpoint.blocks import Block
from llmpipe.checkpoint.source import Slices, TensorSource, resolved, sizes_of
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.files import CHUNK_BYTES, sha256, write_json

log = logging.getLogger(__name__)

NewRows = Literal["mean", "zeros"]


class GrownSource:
    """A source with more rows in its embedding and head; every other tensor is the source's own."""

    def __init__(self, source: TensorSource, rows: int, how: NewRows = "mean"):
        """`rows`: of the new vocabulary; `how`: new rows are the mean of the old, summed in fp64, or zeros."""
        if rows < source.shape.vocab:
            raise UserError(f"{source.path} has {source.shape.vocab} rows in its embedding and cannot grow to {rows}")
        self.path, self.source, self.how = source.path, source, how
        self.tokenizer_place = source.tokenizer_place
        self.shape = replace(source.shape, vocab=rows)
        self._table = FAMILIES[self.shape.family].keys(self.shape)
        self._new: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def keys(self) -> list[str]:
        return self.source.keys()

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def blocks(self, key: str) -> list[Block] | None:
        return None if self._grows(key) else self.source.blocks(key)

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        if not self._grows(key):
            return self.source.read(key, slices)
        rows, cols = wanted = resolved(slices, self._table[key].shape(self.shape))
        whole = torch.empty(sizes_of(wanted), dtype=self.dtype(key))
        old = slice(min(rows.start, self.source.shape.vocab), min(rows.stop, self.source.shape.vocab))
        whole[: old.stop - old.start] = self.source.read(key, (old, cols))
        whole[old.stop - old.start :] = self._new_row(key)[cols]
        return whole

    def _grows(self, key: str) -> bool:
        return self._table[key].dims[0] == "vocab"

    def _new_row(self, key: str) -> torch.Tensor:
        """(hidden,), in the stored type."""
        with self._lock:  # the mover's threads share it
            if key not in self._new:
                self._new[key] = mean_row(self.source, key) if self.how == "mean" else torch.zeros(self.shape.hidden)
            return self._new[key].to(self.dtype(key))


def mean_row(source: TensorSource, key: str) -> torch.Tensor:
    """The mean of a matrix's rows, (columns,) in fp64; some rows are in memory at a time."""
    row = FAMILIES[source.shape.family].row(key, source.shape)
    rows, width = row.shape(source.shape)
    total, at_once = torch.zeros(width, dtype=torch.float64), max(1, CHUNK_BYTES // (8 * width))
    for first in range(0, rows, at_once):
        part = source.read(key, (slice(first, min(first + at_once, rows)), slice(None)))
        total += part.sum(0, dtype=torch.float64)
    return total / rows


def grown(source: TensorSource, tokens: tuple[str, ...], how: NewRows) -> TensorSource:
    """The source with a row for each of the tokens; UserError if it has no tokenizer that they could be added to."""
    tokenizer = tokenizer_files.opened(source)
    if tokenizer is None:
        where = source.tokenizer_place
        raise UserError(f"{where} has no tokenizer that tokens could be added to: put its files there")
    before = tokenizer.get_vocab_size()
    added = add(tokenizer, tokens)
    rows = max(source.shape.vocab, tokenizer.get_vocab_size())
    if spare := min(len(added), max(0, source.shape.vocab - before)):
        log.warning(
            "the embedding in %s has %d rows, its tokenizer %d tokens: %d of the added tokens take rows as they are",
            source.path, source.shape.vocab, before, spare,
        )  # fmt: skip
    log.info("%s: %d added tokens, %d new rows (%s)", source.path, len(added), rows - source.shape.vocab, how)
    return GrownSource(source, rows, how)


def add(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> dict[str, int]:
    """Add those tokens that a tokenizer does not have, as special ones; returns the ids of the new."""
    if empty := [token for token in tokens if not token.strip()]:
        raise UserError(f"--add-token {empty[0]!r} is no token: name one as <|im_start|>")
    known = {token: number for token in tokens if (number := tokenizer.token_to_id(token)) is not None}
    if known:
        log.info("not added, there already: %s", ", ".join(f"{token} ({number})" for token, number in known.items()))
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in new])
    ids = tokenizer.get_vocab()
    return {token: ids[token] for token in new}


def add_to_files(directory: Path, tokens: tuple[str, ...]) -> dict[str, str]:
    """Add the tokens to a finished checkpoint's tokenizer; returns the SHA-256 of the files that changed."""
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    added = add(tokenizer, tokens)
    if not added:
        return {}
    tokenizer.save(str(path))
    _extend(directory / "added_tokens.json", added)
    _extend_config(directory / "tokenizer_config.json", added)
    names = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json")
    return {name: sha256(directory / name) for name in names if (directory / name).is_file()}


def _extend(path: Path, added: dict[str, int]) -> None:
    before = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, before | added)


def _extend_config(path: Path, added: dict[str, int]) -> None:
    """added_tokens_decoder repeats every added token, where a tokenizer_config.json has one."""
    config = json.loads(path.read_text()) if path.is_file() else {}
    if "added_tokens_decoder" not in config:
        return
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config["added_tokens_decoder"] |= {str(number): {"content": token, **flags} for token, number in added.items()}
    write_json(path, config)

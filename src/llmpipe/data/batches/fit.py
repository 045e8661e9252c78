"""Checks that a dataset fits a model: the same tokenizer, no token beyond the embedding."""

import logging
from pathlib import Path

from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.tokenizers.beside import hashes
from llmpipe.errors import UserError

log = logging.getLogger(__name__)


def check_tokenizer(prefix: Path, tokenizer: Path) -> None:
    """UserError if the dataset was made with another tokenizer than this file; a missing manifest is a warning.

    A tokenizer that lies there in two kinds of files is the same by either.
    """
    facts = manifest.read(prefix)
    if facts is None:
        log.warning("%s has no manifest: whether %s made its tokens cannot be told", prefix, tokenizer)
        return
    made_with, files = facts["tokenizer"], hashes(tokenizer)
    found = files[tokenizer.name]
    if made_with["sha256"] not in files.values() and found not in made_with.get("files", {}).values():
        raise UserError(
            f"{prefix} is a dataset tokenized by another tokenizer than the model's: it was made with"
            f" {made_with['path']} (SHA-256 {made_with['sha256'][:12]}), the model has {tokenizer} ({found[:12]});"
            f" tokenize the corpus again with --tokenizer {tokenizer.parent}"
        )


def check_vocab(prefix: Path, vocab: int) -> None:
    """UserError if the dataset's vocabulary, or without a manifest its largest token, is beyond the model's."""
    facts = manifest.read(prefix)
    if facts is not None:
        needed, what = facts["tokenizer"]["vocab_size"], "its tokenizer has a vocabulary of"
    else:
        smallest, largest = _extremes(Reader(prefix))
        if smallest < 0:
            raise UserError(f"{prefix} is damaged: it holds token {smallest}; tokenize the corpus again")
        needed, what = largest + 1, "its largest token asks for a vocabulary of"
    if needed > vocab:
        raise UserError(
            f"{prefix} does not fit the model: {what} {needed}, the model's embedding has {vocab} rows;"
            " tokenize the corpus with the model's own tokenizer"
        )


def _extremes(reader: Reader) -> tuple[int, int]:
    """The smallest and the largest token of a dataset, read in parts; 0 and -1 where it has none."""
    step = 1 << 24
    parts = [reader.tokens[i : i + step] for i in range(0, len(reader.tokens), step)]
    found = [(int(part.min()), int(part.max())) for part in parts]
    return min((low for low, _ in found), default=0), max((high for _, high in found), default=-1)

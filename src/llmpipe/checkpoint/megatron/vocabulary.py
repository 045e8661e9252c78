"""The true vocabulary of a padded embedding: said by an option, the args, the head, the shape, a tokenizer beside."""

import json
import logging
from pathlib import Path

from llmpipe.checkpoint import tokenizer_folder
from llmpipe.errors import UserError

log = logging.getLogger(__name__)


def true_vocab(path: Path, padded: int, said: list[tuple[str, int | None]]) -> int:
    """Rows that are no padding, as the first of `said` (who, how many) knows; UserError, with the option, if none does.

    `padded`: rows of the stored embedding.
    """
    who, size = next(((who, size) for who, size in said if size is not None), ("", 0))
    if not who:
        raise UserError(
            f"{path}: the embedding has {padded} rows, some of which may be padding, and neither the args nor a"
            " tokenizer beside says how many are true: say it with --vocab N"
        )
    if not 0 < size <= padded:
        raise UserError(f"{path}: the embedding has {padded} rows, but {who} says {size}: say --vocab N")
    if size < padded:
        log.info("%s: %d of the vocabulary's %d rows are padding, says %s: left out", path, padded - size, padded, who)
    return size


def tokenizer_size(directory: Path) -> int | None:
    """How many words the tokenizer in a directory has."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        model = tokenizer_folder.find(directory)
        return tokenizer_folder.model_size(model) if model else None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        ids = [token["id"] for token in found.get("added_tokens", [])]
        return max([len(found["model"]["vocab"]) - 1, *ids]) + 1
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no tokenizer ({error}): copy or download it again") from error

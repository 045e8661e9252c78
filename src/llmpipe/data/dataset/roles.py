"""Whose each token of a chat is: PREFIX.roles.bin/.idx, a dataset of uint8 with the documents and sizes of PREFIX."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.dataset.manifest import idx_path, suffixed
from llmpipe.errors import UserError

TEMPLATE, USER, ASSISTANT, PADDING = range(4)
"""TEMPLATE: what the template writes, and the system's text; USER: the user's and the tools' text."""
DTYPE = np.dtype(np.uint8)


def roles_prefix(prefix: Path) -> Path | None:
    """The prefix of a dataset's roles; None for a dataset without: it is text, not chats.

    Megatron-LLM calls the two NAME-text and NAME-role; its roles 0, 1 and 2 mean the same.
    """
    found = [suffixed(prefix, ".roles")]
    if prefix.name.endswith("-text"):
        found.append(prefix.with_name(prefix.name.removesuffix("-text") + "-role"))
    return next((path for path in found if idx_path(path).is_file()), None)


def read_roles(reader: Reader) -> Reader:
    """The roles beside a dataset of chats; UserError if they are of other documents."""
    prefix = roles_prefix(reader.prefix)
    assert prefix, reader.prefix
    roles = Reader(prefix)
    if not np.array_equal(roles.starts, reader.starts):
        raise UserError(
            f"{prefix} has {roles.num_documents} documents of {len(roles.tokens)} tokens, {reader.prefix} has"
            f" {reader.num_documents} of {len(reader.tokens)}: not one corpus's; tokenize the corpus again"
        )
    return roles


def loss_weights(roles: NDArray[Any], rest: float) -> NDArray[np.float32]:
    """How much each token counts in the loss: the assistant's 1, padding 0, all others `rest`."""
    return np.array([rest, rest, 1.0, 0.0], np.float32)[roles]

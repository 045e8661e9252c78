"""Checkpoints whose vocabulary convert let grow, compared with their source.

The old rows are compared as ever; the new ones have a check of their own, whose rule is written here a second time.
"""

import torch

from llmpipe.verify.card import Check, at_most
from llmpipe.verify.hf import HfModel
from llmpipe.verify.inventory import Inventory, layer_number
from llmpipe.verify.merged import ROUNDING
from llmpipe.verify.ours import OurModel

_ROWS = 4096


class Cut:
    """A grown checkpoint as it was before: `rows` of the vocabulary."""

    def __init__(self, model: HfModel, rows: int):
        self.path, self.model, self.rows = model.path, model, rows
        self.kind, self.num_layers, self.longest_text = model.kind, model.num_layers, model.longest_text
        self.embed, self.block, self.names, self.dtype = model.embed, model.block, model.names, model.dtype
        self.tables = vocabulary_tables(model)

    def read(self, name: str) -> torch.Tensor:
        """One tensor; embedding and head without their new rows."""
        whole = self.model.read(name)
        return whole[: self.rows] if name in self.tables else whole

    def hyper_parameters(self) -> dict[str, float | str]:
        """Those of before."""
        return self.model.hyper_parameters() | {"vocabulary": self.rows}

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to the logits of old tokens (B, T, rows)."""
        return self.model.head(hidden)[..., : self.rows]


class CutRunner:
    """Our decoder on a grown checkpoint, its logits those of the old tokens."""

    def __init__(self, model: OurModel, rows: int):
        self.path, self.num_layers, self.model, self.rows = model.path, model.num_layers, model, rows
        self.embed, self.block = model.embed, model.block

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to the logits of old tokens (B, T, rows)."""
        return self.model.head(hidden)[..., : self.rows]


def vocabulary_tables(model: HfModel) -> list[str]:
    """The checkpoint's names of embedding and head."""
    tables = ("embed_tokens.weight", "word_embeddings.weight", "lm_head.weight")
    return [name for name in model.names() if name.endswith(tables)]


def new_row_check(model: HfModel, source: Inventory, rows: int, how: str) -> Check:
    """The row of the card on the rows of added tokens: the mean of the source's rows, or zeros, rounded as it is."""
    tables = [source.read(name) for name in source.names() if layer_number(name) is None]
    tables = [table for table in tables if table.ndim == 2]  # embedding and head, whatever they are called
    wrong = []
    for name in vocabulary_tables(model):
        whole = model.read(name)
        old, new = whole[:rows], whole[rows:]
        own = next((table for table in tables if torch.equal(table.to(whole.dtype), old)), old)
        least, most = (bound.to(own.dtype).to(whole.dtype) for bound in _bounds(own, how))
        unequal = int(((new < least) | (new > most) | new.isnan()).any(dim=1).sum())
        wrong += [f"{name}: {unequal} of {len(new)}"] if unequal else []
    detail = "; ".join(wrong) or f"each is {'the mean of the old rows' if how == 'mean' else 'zeros'}"
    return at_most("rows of added tokens that differ", len(wrong), 0, detail)


def _bounds(table: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the most of a new row in fp64, (C,): the order of the sum may decide where rounding is in doubt."""
    total = torch.zeros(2, table.shape[1], dtype=torch.float64)  # of the values, and of their sizes
    for part in table.split(_ROWS) if how == "mean" else ():
        total += torch.stack((part.double().sum(0), part.double().abs().sum(0)))
    mean, size = total / len(table)
    return mean - ROUNDING * size, mean + ROUNDING * size

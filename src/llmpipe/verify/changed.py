"""Checkpoints whose vocabulary convert let grow, compared with their source.

The old rows are compared as ever; the new ones have a check of their own, whose rule is written here a second time.
"""

import torch

from llmpipe.verify.card import Check, at_most
from llmpipe.verify.hf import HfModel
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


def new_row_check(model: HfModel, rows: int, how: str) -> Check:
    """The row of the card on the rows of added tokens: the mean of the old ones, or zeros, to the bit."""
    wrong = []
    for name in vocabulary_tables(model):
        whole = model.read(name)
        old, new = whole[:rows], whole[rows:]
        total = sum((part.double().sum(0) for part in old.split(_ROWS)), torch.zeros(old.shape[1], dtype=torch.float64))
        expected = (total / rows if how == "mean" else torch.zeros_like(total)).to(whole.dtype)
        unequal = int((new != expected).any(dim=1).sum())
        wrong += [f"{name}: {unequal} of {len(new)}"] if unequal else []
    detail = "; ".join(wrong) or f"each is {'the mean of the old rows' if how == 'mean' else 'zeros'}"
    return at_most("rows of added tokens that differ", len(wrong), 0, detail)

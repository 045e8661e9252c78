"""What convert changes in a model on the way: an adapter merged, tokens added."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint import grow
from llmpipe.checkpoint.adapter import AdaptedSource, describe
from llmpipe.checkpoint.source import TensorSource


@dataclass(frozen=True, slots=True)
class Changes:
    """What to change in a model on the way."""

    adapter: Path | None = None
    """A LoRA adapter in PEFT's format, to be merged."""
    tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary."""
    new_rows: grow.NewRows = "mean"
    """What their rows hold."""

    def apply(self, source: TensorSource, written: torch.dtype | None = None) -> TensorSource:
        """The changed source, to be written in a type; None: each tensor in its own."""
        if self.adapter:
            source = AdaptedSource(source, self.adapter, written)
        return grow.grown(source, self.tokens, self.new_rows) if self.tokens else source

    def described(self, changed: TensorSource) -> dict[str, Any]:
        """For the manifest's source; `changed`: what `apply` made."""
        own = changed.tokenizer_place == self.adapter
        found: dict[str, Any] = {"adapter": describe(self.adapter, own)} if self.adapter else {}
        return found | ({"added_tokens": list(self.tokens), "new_rows": self.new_rows} if self.tokens else {})


UNCHANGED = Changes()

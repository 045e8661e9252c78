"""config/recipes/NAME.yaml: how to train, as frozen dataclasses, which are its schema; no paths, no layout."""

import math
from dataclasses import dataclass, field
from typing import Literal

from llmpipe.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate over the steps."""

    kind: Literal["cosine", "constant"] = "cosine"
    """Its course after warmup: down to min_lr along half a cosine, or constant."""
    warmup: float = 0.0
    """Steps of linear warmup; below 1, a fraction of all steps."""
    min_lr: float = 0.0
    """Where the cosine ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train."""

    seq_len: int
    """Tokens in a sequence."""
    global_batch: int
    """Sequences in a step."""
    steps: int
    """Optimizer steps."""
    lr: float
    """The peak learning rate."""
    schedule: Schedule = field(default_factory=Schedule)
    precision: Literal["bf16", "fp32"] = "bf16"
    """What forward and backward compute in; master weights, gradients' sums and optimizer state are fp32."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, of matrices alone: norms and biases have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip: float = 1.0
    """The gradient's global norm is cut down to this."""
    seed: int = 1234
    """Decides the order of the data."""
    isolate_documents: bool = True
    """Packed documents do not see each other; false crosses them as Megatron does."""
    packing: bool = True
    """Of chats: as many whole ones as fit go into a sequence, which costs no attention between them. false: one in
    each sequence, and a micro-batch is as long as its longest."""
    scalar_loss_mask: float = 0.0
    """Of chats: how much tokens that are not the assistant's count in the loss; the assistant's count 1."""
    recompute: Literal["off", "full"] = "off"
    """full: each layer's activations are computed again in the backward pass."""
    save_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch", "steps", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be 1 or more")
        for name in ("lr", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay is {self.weight_decay}, but has to be 0 or more")
        if not 0 <= self.scalar_loss_mask < math.inf:
            raise UserError(f"scalar_loss_mask is {self.scalar_loss_mask}, but has to be 0 or more")
        if not 0 <= self.schedule.min_lr <= self.lr:
            raise UserError(f"schedule.min_lr is {self.schedule.min_lr}, but has to be from 0 to lr, {self.lr}")
        if not 0 <= self.schedule.warmup < math.inf:
            raise UserError(f"schedule.warmup is {self.schedule.warmup}, but has to be 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}, but has to be two numbers from 0 to below 1, as [0.9, 0.95]")

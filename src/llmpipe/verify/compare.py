"""Two forwards side by side, a block of each at a time; the first block that differs is found on the way.

Both sides carry their own hidden states to the logits. Beside that, each block of the subject also runs on the
reference's hidden states: its own error, without what earlier blocks left behind.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch.nn import functional as F

from llmpipe.errors import UserError
from llmpipe.progress import progress
from llmpipe.verify.card import Check, at_most

# Design decision 5.
LOGIT_LIMIT = 1e-4
LOSS_LIMIT = 1e-5
KL_LIMIT = 1e-8
# A block's own relative error in fp32 is near 1e-6; above this the two compute different things. It locates, no more.
LOCATE = 1e-5

ROW_TOKENS = 128
SEED = 20230718


class Side(Protocol):
    """A model that can be run block by block."""

    path: Path
    num_layers: int

    def embed(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...
    def head(self, hidden: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True)
class Trace:
    """What two forwards gave."""

    local: dict[str, float] = field(default_factory=dict)
    """Each part's own relative error, by its name: embedding, layer 0, ..., head."""
    logits: tuple[torch.Tensor, torch.Tensor] | None = None
    """Reference and subject, (B, T, V) in fp32; None if a side could not be run to its end."""
    broken: str | None = None
    """Where, and why, a side could not go on."""

    @property
    def first_difference(self) -> str | None:
        above = (
            f"{name} (relative difference {error:.1e})" for name, error in self.local.items() if not error <= LOCATE
        )
        return next(above, self.broken)


def probe(vocab: int, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed batch made to show mistakes: token ids and positions, both (3, T).

    Row 0 is random; row 1 repeats a short phrase, so that only positions tell its tokens apart; row 2 has its second
    half at the last positions that the model knows, where a wrong rotary base shows most. The vocabulary's ends are in
    each.
    """
    length = min(ROW_TOKENS, max_positions)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(vocab, (3, length), generator=generator)
    tokens[1] = tokens[1, :7].repeat(length // 7 + 1)[:length]
    tokens[:, 1], tokens[:, -2], tokens[:, length // 2] = 0, vocab - 1, vocab - 1
    positions = torch.arange(length).repeat(3, 1)
    positions[2, length // 2 :] += max_positions - length
    return tokens, positions


@torch.inference_mode()
def stream(reference: Side, subject: Side, tokens: torch.Tensor, positions: torch.Tensor) -> Trace:
    """Run both sides on the same tokens, one block of each in memory at a time."""
    trace = Trace()
    where = "embedding"
    parts = max(reference.num_layers, subject.num_layers)
    try:
        with progress("verify", parts + 2, "blocks") as shown:
            ours, theirs = reference.embed(tokens), subject.embed(tokens)  # (B, T, C)
            trace.local[where] = relative_difference(ours, theirs, ours)
            shown.add(1, where)
            for layer in range(parts):
                where = f"layer {layer}"
                _check_there(layer, reference, subject)
                before, ours = ours, reference.block(layer, ours, positions)
                trace.local[where] = relative_difference(ours, subject.block(layer, before, positions), before)
                theirs = subject.block(layer, theirs, positions)
                shown.add(1, where)
            where = "head"
            logits, local = reference.head(ours), subject.head(ours)  # (B, T, V)
            trace.local[where] = relative_difference(logits, local, logits)
            trace.logits = logits, subject.head(theirs)
            shown.add(1, where)
    except (UserError, RuntimeError) as error:  # torch's: a tensor does not fit the settings
        trace.broken = f"{where}: {error}"
    return trace


def _check_there(layer: int, *sides: Side) -> None:
    for side in sides:
        if layer >= side.num_layers:
            raise UserError(f"{side.path} has {side.num_layers} layers only")


@torch.inference_mode()
def run(side: Side, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One side's logits (B, T, V) in fp32."""
    hidden = side.embed(tokens)
    for layer in range(side.num_layers):
        hidden = side.block(layer, hidden, positions)
    return side.head(hidden)


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor) -> float:
    """The largest over positions of |ours - theirs| / max(|before|, |ours|), Euclidean norms over the last dimension.

    The size before the block counts too: where a block cancels a large state, rounding is relative to the large one.
    """
    if ours.shape != theirs.shape:
        return math.inf
    scale = torch.maximum(before.norm(dim=-1), ours.norm(dim=-1)).clamp(min=1e-30)
    return float(((ours - theirs).norm(dim=-1) / scale).max())


def numeric_checks(trace: Trace, tokens: torch.Tensor) -> list[Check]:
    """Design decision 5's thresholds on what the two forwards gave."""
    logit, loss, divergence = measure(*trace.logits, tokens) if trace.logits else (None, None, None)
    checks = [
        at_most("largest logit difference", logit, LOGIT_LIMIT, "max |Δlogit| / max |logit|, all positions, fp32"),
        at_most("loss difference", loss, LOSS_LIMIT, "|Δ| of the mean next-token loss on the same targets"),
        at_most("KL divergence", divergence, KL_LIMIT, "the largest at the first, middle and last position"),
    ]
    if trace.local:
        worst = max(trace.local, key=lambda name: trace.local[name])
        detail = trace.broken or f"the largest of one block on equal input, at {worst}: it tells where, not whether"
        verdict = "fail" if trace.broken else "pass"
        checks.append(Check("relative difference of a block", trace.local[worst], None, verdict, detail))
    return checks


def measure(ours: torch.Tensor, theirs: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float, float]:
    """max |dlogit| / max |logit|, |dloss|, and KL at first, middle and last positions; infinite for unequal shapes."""
    if ours.shape != theirs.shape:
        return math.inf, math.inf, math.inf
    ours, theirs = ours.double(), theirs.double()  # (B, T, V)
    logit = (ours - theirs).abs().max() / ours.abs().max()
    loss = [F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for x in (ours, theirs)]
    some = [0, ours.shape[1] // 2, ours.shape[1] - 1]
    p, q = ours[:, some].log_softmax(-1), theirs[:, some].log_softmax(-1)  # (B, 3, V)
    divergence = (p.exp() * (p - q)).sum(-1).max()
    return float(logit), float((loss[0] - loss[1]).abs()), float(divergence)

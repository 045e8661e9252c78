"""What a rank trains on in a step.

B = micro_batch, T = seq_len, or less where chats are not packed; M = micro-batches of a rank in a step.
With context parallelism each of cp ranks has its own B · T / cp tokens of a micro-batch as one row: B is 1 then.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from llmpipe.layout import context_slices

TABLES = ("tokens", "labels", "weights", "assistant")
"""What a batch has one of for each token."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one rank trains on in one step."""

    tokens: torch.Tensor
    """(M, B, T) int64."""
    labels: torch.Tensor
    """(M, B, T) int64: the token after each."""
    weights: torch.Tensor
    """(M, B, T) float32: 0 where the label belongs to another document than the token or is padding, else 1, or in
    chats what the label's role says."""
    assistant: torch.Tensor
    """(M, B, T) bool: where the label is a chat's assistant's."""
    cu_seqlens: torch.Tensor
    """(M, max_docs + 1) int32: where documents start in the B * T tokens of a micro-batch, padded with B * T; of all
    cp ranks' tokens."""
    lengths: tuple[int, ...]
    """(M,) of each micro-batch the T that it needs. What lies beyond is padding, and not in its cu_seqlens."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a rank's device."""
        moved = {name: getattr(self, name).to(device) for name in (*TABLES, "cu_seqlens")}
        return replace(self, **moved)

    def of_context_rank(self, cp: int, rank: int) -> "Batch":
        """The tokens of each micro-batch that one of cp ranks holds."""
        if cp == 1:
            return self

        def own(table: torch.Tensor) -> torch.Tensor:  # (M, B, T) → (M, 1, B * T / cp)
            rows = [row[:, :length].flatten() for row, length in zip(table, self.lengths, strict=True)]
            parts = [torch.cat([row[part] for part in context_slices(len(row), cp, rank)]) for row in rows]
            return pad_sequence(parts, batch_first=True)[:, None]

        lengths = tuple(self.tokens.shape[1] * length // cp for length in self.lengths)
        return replace(self, **{name: own(getattr(self, name)) for name in TABLES}, lengths=lengths)

    def micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Each one's tokens, cu_seqlens, labels, weights; all but cu_seqlens (N,) with N = B * T of its own."""
        tables = (self.by_micro_batch(name) for name in ("tokens", "labels", "weights"))
        for cu_seqlens, tokens, labels, weights in zip(self.cu_seqlens, *tables, strict=True):
            yield tokens, cu_seqlens, labels, weights

    def by_micro_batch(self, name: str) -> list[torch.Tensor]:
        """A table's (N,) of each micro-batch."""
        return [rows[:, :length].flatten() for rows, length in zip(getattr(self, name), self.lengths, strict=True)]

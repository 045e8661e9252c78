"""How often the label was what the model found likeliest, over all ranks; and a loss as perplexity."""

import math
from typing import Any

import torch
import torch.distributed as dist

from llmpipe.data.batches.batch import Batch
from llmpipe.parallel.groups import Groups


class Tally:
    """Counts labels that count in the loss (weight above 0), and how many of them the model found likeliest."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self._forget()

    def _forget(self) -> None:
        # labels, hits, the assistant's labels in chats, hits of those; all tokens
        self.counts = torch.zeros(5, dtype=torch.float64, device=self.groups.device)

    def add(self, model: Any, batch: Batch) -> None:
        """This rank's batch, whose hits are taken from the model; only the last stage has any."""
        if not model.hits:
            return
        hits = torch.cat(model.hits)
        model.hits.clear()
        counted = torch.cat(batch.by_micro_batch("weights")) > 0
        assistant = torch.cat(batch.by_micro_batch("assistant")) & counted
        found = counted, hits & counted, assistant, hits & assistant, torch.ones_like(counted)
        self.counts += torch.stack([x.sum() for x in found])

    def take(self) -> tuple[dict[str, float | None], int]:
        """`accuracy`, of chats `assistant_accuracy` too, over all ranks since the last call; all tokens."""
        counts = self.counts / self.groups.layout.tp  # the tp ranks of a stage all have the same
        dist.all_reduce(counts)
        self._forget()
        labels, hits, of_assistant, assistant_hits, tokens = counts.tolist()
        found = {"accuracy": hits / labels if labels else None}
        found |= {"assistant_accuracy": assistant_hits / of_assistant} if of_assistant else {}
        return found, round(tokens)


def perplexity(loss: float) -> float | None:
    """exp(loss); None for what is no number, or too large for one."""
    return math.exp(loss) if -math.inf < loss < 700 else None

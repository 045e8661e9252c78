"""Evaluation on held-out documents while training: forward only, nothing dropped, no state changed.

N tokens of a micro-batch, H hidden.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from llmpipe.data.batches.held_out import HeldOut
from llmpipe.data.batches.loader import Loader
from llmpipe.model.rank import RankModel
from llmpipe.parallel.data import drop_gathered
from llmpipe.parallel.groups import Groups
from llmpipe.train.job import Job
from llmpipe.train.tally import Tally, perplexity

LOOKS_EVERY = 16
"""Micro-batches between two looks at whether the training has to stop: pipeline stages wait for each other then."""


class Evaluation:
    """A job's held-out rows, which all ranks share out; each evaluation takes all of them."""

    def __init__(self, job: Job, groups: Groups, dtype: torch.dtype):
        """`dtype`: what passes between stages."""
        recipe, layout, at = job.recipe, job.layout, groups.at
        self.groups, self.dtype, self.tally = groups, dtype, Tally(groups)
        data, split = job.held_out
        most_rows = recipe.eval_batches * recipe.global_batch
        rows = HeldOut(data, split, "validation", recipe.seq_len, most_rows, recipe.seed, recipe.scalar_loss_mask)
        at_once = layout.dp * layout.micro_batch
        self.num_micro_batches = -(-len(rows) // at_once)
        self.loader = Loader(
            rows,
            seq_len=recipe.seq_len,
            global_batch=at_once,
            micro_batch=layout.micro_batch,
            dp=layout.dp,
            dp_rank=at.dp,
            cp=layout.cp,
            cp_rank=at.cp,
        )

    @torch.no_grad()
    def run(self, model: RankModel, has_to_stop: Callable[[], bool]) -> dict[str, float | None]:
        """What the model makes of the held-out rows, as metrics have it; all ranks call it together.

        Nothing, if the training has to stop, which is asked of all ranks together: saving comes first.
        """
        start, device = time.perf_counter(), self.groups.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)  # Σ w·ℓ, Σ w of this rank
        for i in range(self.num_micro_batches):
            if i % LOOKS_EVERY == 0 and has_to_stop():
                drop_gathered(model)
                self.tally.take()
                return {}
            batch = self.loader.step(i).to(device)
            loss = self._loss(model, *next(batch.micro_batches()))
            if self.groups.is_last_stage:
                sums += torch.stack([loss[0], batch.weights.sum()])
            self.tally.add(model, batch)
        drop_gathered(model)
        dist.all_reduce(sums)  # tp ranks all have the same, which leaves the mean as it is
        mean, (accuracies, _) = float(sums[0] / sums[1]), self.tally.take()
        found = {"loss": mean if math.isfinite(mean) else None, "perplexity": perplexity(mean), **accuracies}
        found["seconds"] = round(time.perf_counter() - start, 6)
        return {f"eval_{key}": value for key, value in found.items()}

    def _loss(
        self,
        model: RankModel,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Σ w·ℓ of one micro-batch, (1,): 0 but on the last stage; each stage waits for the one before."""
        groups = self.groups
        for stage in model:
            x = tokens if stage.is_first else self._receive(len(tokens), model.shape.hidden)  # (N,), or (N/tp, H)
            x = stage(x, cu_seqlens, labels, weights)  # (N/tp, H), or (1,)
            if stage.is_last:
                return x
            dist.send(x.contiguous(), group=groups.pp, group_dst=(groups.at.pp + 1) % groups.layout.pp)
        return torch.zeros(1, device=groups.device)

    def _receive(self, num_tokens: int, hidden: int) -> torch.Tensor:
        groups = self.groups
        x = torch.empty(num_tokens // groups.layout.tp, hidden, dtype=self.dtype, device=groups.device)
        dist.recv(x, group=groups.pp, group_src=(groups.at.pp - 1) % groups.layout.pp)
        return x

"""AdamW on each rank's own part of the parameters, and the gradient's norm over all of them.

Loshchilov and Hutter 2019.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from llmpipe.checkpoint.convert import DTYPES
from llmpipe.families import FAMILIES, Shape
from llmpipe.parallel.data import drop_gathered, local, take_gradients
from llmpipe.parallel.groups import Groups
from llmpipe.recipe import Recipe
from llmpipe.train.apex import fused_adamw
from llmpipe.train.loss_scale import DynamicScale

_CACHED = 1 << 18  # elements whose fp32 copy stays in a core's cache


class Optimizer:
    """Steps AdamW; `parameters` maps our names to this rank's local tensors.

    They share the model's storage, or are the weights that it has a rounded copy of, which follows them.
    """

    def __init__(self, model: nn.Module, shape: Shape, recipe: Recipe, groups: Groups):
        self.model, self.shape, self.groups, self.max_norm = model, shape, groups, recipe.clip
        self.scale = DynamicScale(recipe.loss_scale if recipe.precision == "fp16" else None)
        self.skipped_steps = 0
        self.shards = {key: local(p.detach()) for key, p in model.named_parameters()}
        kept = DTYPES[recipe.parameters]
        self.parameters = {key: nn.Parameter(shard.to(kept)) for key, shard in self.shards.items()}
        decayed = [p for key, p in self.parameters.items() if self._is_decayed(key, recipe)]
        plain = [p for key, p in self.parameters.items() if not self._is_decayed(key, recipe)]
        parts = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw, self.divides_in_step = _adamw(parts, recipe), "adamw" not in recipe.apex

    def _is_decayed(self, key: str, recipe: Recipe) -> bool:
        is_matrix = len(FAMILIES[self.shape.family].row(key, self.shape).dims) > 1
        return is_matrix and (recipe.decay_embedding or key != "embedding.weight")

    @torch.no_grad()
    def reduce_and_clip(self) -> float:
        """Take over the gradients, sum what data ranks and tp ranks hold of them; the step will clip them.

        Returns the norm before clipping, without the loss scale.
        """
        for key, gradient in take_gradients(self.model, self.groups):
            self.parameters[key].grad = gradient.to(self.parameters[key].dtype)
        self._sum_over_tp()
        self._sum_tied()
        norm = self._norm() / self.scale.value
        divisor = ((norm + 1e-6) / self.max_norm).clamp(min=1.0) * self.scale.value
        by, told = torch.stack([divisor, norm]).tolist()
        self._divide_gradients(divisor if by != 1 else None)
        return told

    def _divide_gradients(self, divisor: torch.Tensor | None) -> None:
        """torch's AdamW does it as it reads them, told as by GradScaler, without a pass of its own; apex's does not."""
        if self.divides_in_step:
            self.adamw.grad_scale = divisor  # type: ignore[attr-defined]
        elif divisor is not None:
            for parameter in self.parameters.values():
                assert parameter.grad is not None
                parameter.grad.div_(divisor)

    def step(self, lr: float, weight_decay: float) -> None:
        """One AdamW step at this rate, and decay of what has any; the gradients are gone afterwards."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.param_groups[0]["weight_decay"] = weight_decay
        self.adamw.step()
        self.adamw.zero_grad()
        self.into_model()

    def skip(self) -> None:
        """Drop the gradients of a step whose loss or gradient is no number."""
        self.adamw.zero_grad()
        self.skipped_steps += 1

    @torch.no_grad()
    def into_model(self) -> None:
        """Hand the weights to the model, which has them already, but for those of its own type."""
        drop_gathered(self.model)
        for key, shard in self.shards.items():
            if shard.dtype != self.parameters[key].dtype:
                shard.copy_(self.parameters[key])

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tensors."""
        return {"skipped_steps": self.skipped_steps, "loss_scale": self.scale.state()}

    def resume(self, step: int, counters: dict[str, Any]) -> None:
        """Go on after `step` steps from what a checkpoint kept; the tensors are loaded."""
        self.skipped_steps = counters["skipped_steps"]
        self.scale.load(counters["loss_scale"])
        for state in self.adamw.state.values():
            if "step" in state:
                state["step"].fill_(step - self.skipped_steps)
        for group in self.adamw.param_groups:
            group["step"] = step - self.skipped_steps  # where apex's counts, and only there
        self.into_model()

    def copies(self, key: str) -> int:
        """How many tp ranks hold the same values of a parameter: all of a norm, some of a KV head."""
        row, tp = FAMILIES[self.shape.family].row(key, self.shape), self.groups.layout.tp
        if row.shard_dim is None:
            return tp
        return max(1, tp // self.shape.num_kv_heads) if row.dims[row.shard_dim] == "kv" else 1

    def _sum_over_tp(self) -> None:
        """Each tp rank has the gradient of its own tokens, or query heads, alone: one flat all-reduce for all."""
        if self.groups.layout.tp == 1:
            return
        shared = [key for key in self.parameters if self.copies(key) > 1]
        slots = [self._slots(key) for key in shared]
        flat = torch.cat([slot.flatten() for slot in slots])
        dist.all_reduce(flat, group=self.groups.tp.group)
        for key, slot in zip(shared, flat.split([slot.numel() for slot in slots]), strict=True):
            grad = self.parameters[key].grad
            assert grad is not None
            grad.copy_(slot.view(self._num_slots(key), *grad.shape)[self._slot(key)])

    def _slots(self, key: str) -> torch.Tensor:
        """(different values, *grad): this rank's gradient in the slot of the value that it holds, zeros elsewhere."""
        grad = self.parameters[key].grad
        assert grad is not None
        slots = grad.new_zeros(self._num_slots(key), *grad.shape)
        slots[self._slot(key)] = grad
        return slots

    def _num_slots(self, key: str) -> int:
        return self.groups.layout.tp // self.copies(key)

    def _slot(self, key: str) -> int:
        return self.groups.at.tp // self.copies(key)

    def is_tied_copy(self, key: str) -> bool:
        """Whether the first and the last pipeline rank both hold a parameter: an embedding that is also the head."""
        return self.shape.tie_embeddings and self.groups.layout.pp > 1 and key == "embedding.weight"

    def _sum_tied(self) -> None:
        """One stage has the embedding's gradient, another the head's: they swap them, and both take the sum.

        a + b is b + a to the last bit, so that the copies stay equal.
        """
        last = self.groups.layout.pp - 1
        for key in filter(self.is_tied_copy, self.parameters):
            own = self.parameters[key].grad
            assert own is not None
            theirs, other = torch.empty_like(own), last if self.groups.is_first_stage else 0
            swap = [
                dist.P2POp(dist.isend, own, group=self.groups.pp, group_peer=other),
                dist.P2POp(dist.irecv, theirs, group=self.groups.pp, group_peer=other),
            ]
            for work in dist.batch_isend_irecv(swap):
                work.wait()
            own.add_(theirs)

    def _norm(self) -> torch.Tensor:
        """The norm over all ranks' shards; what several ranks hold counts once."""
        total = torch.zeros((), device=self.groups.device)
        for key, parameter in self.parameters.items():
            assert parameter.grad is not None
            tied = 2 if self.is_tied_copy(key) else 1
            total += sum_of_squares(parameter.grad) / (self.groups.layout.copies * self.copies(key) * tied)
        dist.all_reduce(total)
        return total.sqrt()


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Σ x², () in fp32, without a tensor as large as x.

    On the CPU row by row: torch.linalg.vector_norm of all adds up a few long chains there, and is off by 1e-3 after 16
    million elements.
    """
    if x.is_cuda:
        return torch.linalg.vector_norm(x, dtype=torch.float32).square()
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]  # (rows, row)
    blocks = rows.split(max(1, _CACHED // max(1, x.shape[-1])))
    return torch.cat([torch.linalg.vector_norm(block.float(), dim=-1) for block in blocks]).square().sum()


def _adamw(parameters: list[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's fused AdamW, or apex's."""
    options: dict[str, Any] = {"lr": recipe.lr, "betas": (recipe.betas[0], recipe.betas[1]), "eps": recipe.eps}
    if "adamw" in recipe.apex:
        return fused_adamw()(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)

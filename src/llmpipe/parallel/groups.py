"""The process groups of a run: who reduces with whom."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmpipe.errors import UserError
from llmpipe.layout import Coordinates, Layout


@dataclass(frozen=True, slots=True)
class Split:
    """The ranks that have something in parts; `group` None is one rank on its own."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0


class TensorParallel(Split):
    """The ranks that split one layer."""

    __slots__ = ()


class ContextParallel(Split):
    """The ranks that split a micro-batch's tokens."""

    __slots__ = ()


ONE_CONTEXT = ContextParallel()


@dataclass(frozen=True, slots=True)
class Groups:
    """A rank's place in the layout, and its groups along each axis."""

    layout: Layout
    at: Coordinates
    device: torch.device
    mesh: DeviceMesh
    """pp x copies x shards x tp: dp x cp ranks have the same parameters, in copies of which each is shared out."""
    data: dist.ProcessGroup
    """The dp x cp ranks that have the same parameters."""
    cp: ContextParallel = ONE_CONTEXT

    @property
    def tp(self) -> TensorParallel:
        return TensorParallel(self.mesh["tp"].get_group(), self.layout.tp, self.at.tp)

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.mesh["pp"].get_group()

    @property
    def data_rank(self) -> int:
        return self.at.dp * self.layout.cp + self.at.cp

    @property
    def shard_rank(self) -> int:
        """Which of a parameter's `layout.shards` parts this rank holds."""
        return self.data_rank % self.layout.shards

    @property
    def sharding(self) -> DeviceMesh:
        """Over which FSDP2 shares parameters out: the shards, and their copies where there are any."""
        return self.mesh["copies", "shards"] if self.layout.copies > 1 else self.mesh["shards"]

    @property
    def is_first_stage(self) -> bool:
        return self.at.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp == self.layout.pp - 1


def rank_device(kind: str) -> torch.device:
    """This rank's device; a GPU by its local rank."""
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "device cuda was asked for, but torch sees no GPU here: device cpu takes gloo processes instead"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def make_groups(layout: Layout, device: torch.device) -> Groups:
    """The groups of this process; every rank of the default group calls it with the same resolved layout."""
    sizes = layout.pp, layout.copies, layout.shards, layout.tp
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "copies", "shards", "tp"))
    at = layout.coordinates(dist.get_rank())
    cp = ContextParallel(_groups_along(layout, 2, 2) if layout.cp > 1 else None, layout.cp, at.cp)
    if layout.copies > 1 and layout.shards > 1:
        data = _groups_along(layout, 1, 2)
    else:
        data = mesh["copies" if layout.copies > 1 else "shards"].get_group()
    # NCCL makes a group's communicator at the group's first collective, and all of its ranks have to take part: of a
    # pipeline's, the schedules only send in pairs, and tied embeddings are summed by its first and last rank alone.
    dist.all_reduce(torch.zeros(1, device=device), group=mesh["pp"].get_group())
    return Groups(layout, at, device, mesh, data, cp)


def _groups_along(layout: Layout, first: int, last: int) -> dist.ProcessGroup:
    """This process's ranks along axes `first` to `last` of pp, dp, cp, tp; every rank makes all such groups."""
    ranks = torch.arange(layout.processes).view(layout.pp, layout.dp, layout.cp, layout.tp)
    together = ranks.flatten(first, last).movedim(first, -1)
    group, _ = dist.new_subgroups_by_enumeration(together.flatten(0, -2).tolist())
    return group  # type: ignore[return-value]  # every rank is in one

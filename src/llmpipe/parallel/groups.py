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
    """pp x data x tp. `data` is dp x cp: the ranks that hold copies, or shards, of the same parameters."""
    cp: ContextParallel = ONE_CONTEXT

    @property
    def tp(self) -> TensorParallel:
        return TensorParallel(self.mesh["tp"].get_group(), self.layout.tp, self.at.tp)

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.mesh["pp"].get_group()

    @property
    def data(self) -> dist.ProcessGroup:
        return self.mesh["data"].get_group()

    @property
    def num_data(self) -> int:
        return self.layout.dp * self.layout.cp

    @property
    def data_rank(self) -> int:
        return self.at.dp * self.layout.cp + self.at.cp

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
    sizes = layout.pp, layout.dp * layout.cp, layout.tp
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "data", "tp"))
    at = layout.coordinates(dist.get_rank())
    return Groups(layout, at, device, mesh, ContextParallel(_context_group(layout), layout.cp, at.cp))


def _context_group(layout: Layout) -> dist.ProcessGroup | None:
    """This process's part of `data`, the ranks that differ in cp alone; every rank makes all such groups."""
    if layout.cp == 1:
        return None
    ranks = torch.arange(layout.processes).view(layout.pp, layout.dp, layout.cp, layout.tp)
    group, _ = dist.new_subgroups_by_enumeration(ranks.movedim(2, -1).reshape(-1, layout.cp).tolist())
    return group  # type: ignore[return-value]  # every rank is in one

"""Which rank is where: (dp, pp, tp) of each process, the layers of a stage, the slice of a tensor that a rank holds.

Ranks are numbered as in Megatron: tp changes fastest, then cp, then dp, then pp.
"""

from dataclasses import dataclass, replace
from typing import Literal

from llmpipe.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the processes of a run share the model and the batch."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 1
    """Processes on each machine, one a GPU."""
    tp: int = 1
    """Tensor-parallel ranks: each holds a slice of every layer, and of the sequence between layers."""
    pp: int = 1
    """Pipeline stages: each holds a run of layers."""
    cp: int = 1
    """Context-parallel ranks; only 1 for now."""
    dp: int = -1
    """Data-parallel ranks, which share optimizer state; -1 takes what tp, pp and cp leave over."""
    micro_batch: int = 1
    """Sequences in one forward pass of a rank."""
    vp: int = 1
    """Virtual stages a rank; only 1 for now."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu takes gloo processes on the CPU; it is never chosen silently."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tp", "pp", "cp", "micro_batch", "vp"):
            if getattr(self, name) < 1:
                raise UserError(f"layout: {name} is {getattr(self, name)}, but has to be 1 or more")
        for name in ("cp", "vp"):
            if getattr(self, name) != 1:
                raise UserError(f"layout: {name} is {getattr(self, name)}; this version of llmpipe runs {name}: 1 only")

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def rank_files(self) -> str:
        """The name of a directory with the rank files of this layout."""
        return f"tp{self.tp}-pp{self.pp}"

    def resolved(self) -> "Layout":
        """The same layout with dp filled in; UserError if the factors do not make the number of processes."""
        model_ranks = self.tp * self.pp * self.cp
        dp = self.processes // model_ranks if self.dp == -1 else self.dp
        if dp < 1 or dp * model_ranks != self.processes:
            given = f"tp {self.tp} x pp {self.pp} x cp {self.cp} x dp {self.dp}"
            fits = [n for n in range(1, self.processes + 1) if self.processes % n == 0]
            raise UserError(
                f"layout: {given} does not make {self.processes} processes ({self.nodes} nodes x"
                f" {self.gpus_per_node} gpus_per_node): tp x pp x cp has to be one of {fits}, with dp the rest or -1"
            )
        return replace(self, dp=dp)

    def coordinates(self, rank: int) -> "Coordinates":
        """Where a rank is; the layout has to be resolved."""
        tp, rest = rank % self.tp, rank // self.tp
        return Coordinates(dp=rest % self.dp, pp=rest // self.dp, tp=tp)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place on each axis."""

    dp: int
    pp: int
    tp: int


def legal_tps(num_heads: int, num_kv_heads: int) -> list[int]:
    """The tp that divide the query heads and divide, or are a multiple of, the KV heads (design decision 12)."""
    return [
        tp
        for tp in range(1, num_heads + 1)
        if num_heads % tp == 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0)
    ]


def check_split(tp: int, pp: int, num_heads: int, num_kv_heads: int, num_layers: int, ffn: int) -> None:
    """UserError, naming what would work, if the model cannot be split tp x pp."""
    if tp not in legal_tps(num_heads, num_kv_heads):
        legal = [n for n in legal_tps(num_heads, num_kv_heads) if ffn % n == 0]
        raise UserError(
            f"tp {tp} does not divide {num_heads} query heads and {num_kv_heads} KV heads: tp has to be one of {legal}"
        )
    if ffn % tp:
        raise UserError(f"tp {tp} does not divide the MLP's {ffn} rows")
    if num_layers % pp:
        legal = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise UserError(f"pp {pp} does not divide {num_layers} layers: pp has to be one of {legal}")


def stage_layers(num_layers: int, pp: int, stage: int) -> range:
    """The global numbers of a stage's layers."""
    each = num_layers // pp
    return range(stage * each, (stage + 1) * each)


def chunk(size: int, parts: int, index: int) -> slice:
    """Part `index` of `size` rows in parts of ceil(size / parts), the last ones shorter: torch.chunk's rule."""
    each = -(-size // parts)
    return slice(min(index * each, size), min((index + 1) * each, size))


def kv_chunk(num_kv_heads: int, head_dim: int, tp: int, rank: int) -> slice:
    """The rows of K or V that a rank holds; with fewer heads than tp, tp / num_kv_heads ranks hold the same head."""
    if num_kv_heads >= tp:
        return chunk(num_kv_heads * head_dim, tp, rank)
    head = rank * num_kv_heads // tp
    return slice(head * head_dim, (head + 1) * head_dim)

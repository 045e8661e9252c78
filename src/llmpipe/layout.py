"""Which rank is where: (dp, cp, pp, tp) of a process, the layers of a stage, the slice of a tensor that a rank holds.

Ranks are numbered as in Megatron: tp changes fastest, then cp, then dp, then pp.
"""

import math
from dataclasses import dataclass, field, replace
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
    """Context-parallel ranks: each holds a part of every sequence, for those that are too long for one."""
    dp: int = -1
    """Data-parallel ranks, which share optimizer state; -1 takes what tp, pp and cp leave over."""
    micro_batch: int = 1
    """Sequences in one forward pass of a rank."""
    vp: int = 1
    """Virtual stages of a pipeline rank: with more than 1 it holds that many shorter runs of layers, and waits less."""
    pp_schedule: Literal["1f1b", "interleaved", "gpipe", "zero-bubble"] = "1f1b"
    """The order of forward and backward passes: 1f1b, interleaved where vp is above 1; gpipe, all forward and then all
    backward, which keeps the most activations; zero-bubble, where the weights' gradients fill the gaps."""
    pp_layers: list[int] = field(default_factory=list)
    """How many layers each pipeline stage holds, where the split is uneven; left out, all hold as many."""
    data_parallel: Literal["full", "optimizer", "plain", "hybrid"] = "full"
    """What the dp x cp ranks that have the same parameters share out. full: weights, gradients and optimizer state
    (FSDP2); optimizer: all of them between steps, but weights are whole during a step, gathered once; plain: nothing,
    each rank holds all; hybrid: as full inside each node, of which the others are copies."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu takes gloo processes on the CPU; it is never chosen silently."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "tp", "pp", "cp", "micro_batch", "vp"):
            if getattr(self, name) < 1:
                raise UserError(f"layout: {name} is {getattr(self, name)}, but has to be 1 or more")

    def check_training(self) -> None:
        """UserError, naming what would work, for a schedule that these stages cannot have; the layout is resolved."""
        if self.pp == 1 and self.pp_schedule != "1f1b":
            raise UserError(
                f"layout: pp_schedule {self.pp_schedule} is an order of pipeline stages, and pp is 1: leave it out, or"
                " take pp 2 or more"
            )
        if self.pp_schedule == "interleaved" and self.vp == 1:
            raise UserError("layout: pp_schedule interleaved is for virtual stages: 1f1b, or vp 2, would work")
        if self.pp_schedule == "gpipe" and self.vp > 1:
            raise UserError(
                f"layout: pp_schedule gpipe has no virtual stages, and vp is {self.vp}: vp 1, or pp_schedule"
                " interleaved or zero-bubble, would work"
            )
        if self.data_parallel == "hybrid":
            self._check_hybrid()

    def _check_hybrid(self) -> None:
        """UserError, naming what would work, if a copy of the parameters does not lie on one node, or is the only one.

        The layout is resolved.
        """
        given = f"layout: data_parallel hybrid shares parameters out inside each node of {self.gpus_per_node} processes"
        stage = self.tp * self.num_data
        if stage <= self.gpus_per_node:
            raise UserError(
                f"{given} and copies them to others, but tp {self.tp} x cp {self.cp} x dp {self.dp} are all on one:"
                " full would work"
            )
        if stage % self.gpus_per_node or self.gpus_per_node % self.tp:
            raise UserError(
                f"{given}, which tp {self.tp} x cp {self.cp} x dp {self.dp} = {stage} do not fill evenly: full would"
                f" work, or a tp that divides {self.gpus_per_node} and tp x cp x dp that is a multiple of it"
            )
        if self.tp == self.gpus_per_node:
            raise UserError(
                f"{given}, but tp {self.tp} leaves nothing to share out there: plain would work, or full, which shares"
                " out over nodes"
            )

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def num_data(self) -> int:
        """How many ranks have the same parameters, whole or in parts: those of dp and cp, each with its own tokens."""
        return self.dp * self.cp

    @property
    def shards(self) -> int:
        """How many of them share out one copy of the parameters."""
        inside = {"plain": 1, "hybrid": self.gpus_per_node // self.tp}
        return inside.get(self.data_parallel, self.num_data)

    @property
    def copies(self) -> int:
        """How many copies of the parameters they hold."""
        return self.num_data // self.shards

    @property
    def gathers_again(self) -> bool:
        """Whether a layer's weights are whole only while it computes.

        With several stages they are needed again at once, by the next micro-batch.
        """
        return self.shards > 1 and self.data_parallel in ("full", "hybrid") and self.pp == 1

    @property
    def token_parts(self) -> int:
        """What a micro-batch's tokens have to be a multiple of: a cp rank has two chunks, which tp ranks share out."""
        return self.cp * math.lcm(2, self.tp) if self.cp > 1 else self.tp

    @property
    def rank_files(self) -> str:
        """The name of a directory with the rank files of this layout."""
        return f"tp{self.tp}-{self.stages.name}"

    @property
    def stages(self) -> "Stages":
        """Which layers each pipeline rank holds."""
        return Stages(self.pp, self.vp, tuple(self.pp_layers))

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
        cp, rest = rest % self.cp, rest // self.cp
        return Coordinates(dp=rest % self.dp, cp=cp, pp=rest // self.dp, tp=tp)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place on each axis."""

    dp: int
    cp: int
    pp: int
    tp: int


def legal_tps(num_heads: int, num_kv_heads: int) -> list[int]:
    """The tp that divide the query heads and divide, or are a multiple of, the KV heads (design decision 12)."""
    return [
        tp
        for tp in range(1, num_heads + 1)
        if num_heads % tp == 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0)
    ]


def check_split(tp: int, num_heads: int, num_kv_heads: int, ffn: int) -> None:
    """UserError, naming what would work, if the layers cannot be split over tp ranks."""
    legal = [n for n in legal_tps(num_heads, num_kv_heads) if ffn % n == 0]
    if tp not in legal_tps(num_heads, num_kv_heads):
        raise UserError(
            f"tp {tp} does not divide {num_heads} query heads and {num_kv_heads} KV heads: tp has to be one of {legal}"
        )
    if ffn % tp:
        raise UserError(f"tp {tp} does not divide the MLP's {ffn} rows: tp has to be one of {legal}")


@dataclass(frozen=True, slots=True)
class Stages:
    """Which layers each pipeline rank holds: pp ranks, each with vp runs of layers (virtual stages).

    Stage s of pp * vp, in the order of the flow, is on rank s % pp (Megatron's interleaved schedule, arXiv:2104.04473).
    """

    pp: int = 1
    vp: int = 1
    layers: tuple[int, ...] = ()
    """How many layers each of the pp * vp stages holds; none given is an even split."""

    @property
    def name(self) -> str:
        """The part of a rank files' directory name: pp2, pp2-vp2, pp2-layers15.17."""
        uneven = f"-layers{'.'.join(map(str, self.layers))}" if self.layers else ""
        return f"pp{self.pp}" + (f"-vp{self.vp}" if self.vp > 1 else "") + uneven

    @property
    def count(self) -> int:
        """How many stages there are on all ranks together."""
        return self.pp * self.vp

    def of_rank(self, rank: int) -> range:
        """The stages of a pipeline rank."""
        return range(rank, self.count, self.pp)

    def check(self, num_layers: int) -> None:
        """UserError, naming what would work, if a model of so many layers cannot be split so."""
        stages = self.count
        if self.vp > 1 and self.pp == 1:
            raise UserError("virtual stages (vp) share a pipeline: pp has to be 2 or more")
        if self.layers:
            if len(self.layers) != stages or sum(self.layers) != num_layers or min(self.layers) < 1:
                raise UserError(
                    f"pp-layers {','.join(map(str, self.layers))}: {stages} numbers from 1 on are expected, one for"
                    f" each stage, that make {num_layers} layers together"
                )
        elif num_layers % stages:
            legal = [n for n in range(min(self.vp, 2), num_layers + 1) if num_layers % (n * self.vp) == 0]
            virtual = f" x vp {self.vp}" if self.vp > 1 else ""
            would = f"pp has to be one of {legal}" if legal else "take a smaller vp"
            raise UserError(
                f"pp {self.pp}{virtual} does not divide {num_layers} layers: {would}, or"
                f" --pp-layers (layout: pp_layers) says how many layers each of the {stages} stages holds"
            )

    def run(self, num_layers: int, stage: int) -> range:
        """The global numbers of a stage's layers."""
        sizes = self.layers or (num_layers // self.count,) * self.count
        end = sum(sizes[: stage + 1])
        return range(end - sizes[stage], end)

    def runs(self, num_layers: int, rank: int) -> list[range]:
        """The global numbers of a rank's layers, one run for each of its virtual stages."""
        return [self.run(num_layers, stage) for stage in self.of_rank(rank)]

    def layers_of(self, num_layers: int, rank: int) -> list[int]:
        """The global numbers of all layers of a rank."""
        return [layer for run in self.runs(num_layers, rank) for layer in run]


def parse_layers(text: str | None) -> tuple[int, ...]:
    """`--pp-layers 15,17` as numbers; UserError if it is something else."""
    try:
        return tuple(int(number) for number in text.split(",")) if text else ()
    except ValueError as error:
        raise UserError(f"--pp-layers {text}: numbers with commas between them are expected, as 15,17") from error


def chunk(size: int, parts: int, index: int) -> slice:
    """Part `index` of `size` rows in parts of ceil(size / parts), the last ones shorter: torch.chunk's rule."""
    each = -(-size // parts)
    return slice(min(index * each, size), min((index + 1) * each, size))


def context_slices(num_tokens: int, cp: int, rank: int) -> list[slice]:
    """The tokens of a micro-batch that a context rank holds: of 2 · cp chunks the one with its number from either end.

    A text's first tokens see few others and its last ones many: so all ranks have the same work.
    """
    if cp == 1:
        return [slice(0, num_tokens)]
    each = num_tokens // (2 * cp)
    return [slice(number * each, (number + 1) * each) for number in (rank, 2 * cp - 1 - rank)]


def kv_chunk(num_kv_heads: int, head_dim: int, tp: int, rank: int) -> slice:
    """The rows of K or V that a rank holds; with fewer heads than tp, tp / num_kv_heads ranks hold the same head."""
    if num_kv_heads >= tp:
        return chunk(num_kv_heads * head_dim, tp, rank)
    head = rank * num_kv_heads // tp
    return slice(head * head_dim, (head + 1) * head_dim)

"""The parity matrix: each layout trains as one process does, whatever the family, packing and micro-batches of a step.

test_parity_matrix.py trains in each layout once, benchmarks/layout_parity.py in all of the product.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import RECIPE, losses, make_job, run_job

from hf_twins import theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.data.dataset.indexed import Writer
from llmpipe.data.dataset.manifest import suffixed
from llmpipe.data.dataset.roles import ASSISTANT, DTYPE, USER
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight

SEQ_LEN, VOCAB, CHATS = 64, 203, 400
MICRO_BATCH = 2
"""Sequences: so few that context ranks, which share a micro-batch's tokens out in 4 or 8 chunks, cut through them."""
FAMILIES = {"Llama": "llama", "Falcon": "falcon, 4 heads"}
"""Two KV heads for four query heads, and one; transformers' models by their names in hf_twins."""
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": VOCAB, "max_position_embeddings": SEQ_LEN,
    "initializer_range": 0.1,
}  # fmt: skip
"""Weights twice as large make a Llama that turns rounding of 1e-7 into losses of 1e-5 within twelve steps."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tp": 2},
    "CP2": {"cp": 2},
    "DP2": {"dp": 2},
    "PP2": {"pp": 2},
    "TP4": {"tp": 4},
    "CP4": {"cp": 4},
    "PP4": {"pp": 4},
    "TP2 x DP2": {"tp": 2, "dp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "CP2 x TP2": {"cp": 2, "tp": 2},
    "TP2 x PP2 x DP2": {"tp": 2, "pp": 2, "dp": 2},
    "CP2 x DP2": {"cp": 2, "dp": 2},
    "CP2 x PP2": {"cp": 2, "pp": 2},
    "PP2 x DP2": {"pp": 2, "dp": 2},
    "PP2, interleaved": {"pp": 2, "vp": 2},
    "PP2, zero-bubble": {"pp": 2, "pp_schedule": "zero-bubble"},
    "PP2, GPipe": {"pp": 2, "pp_schedule": "gpipe"},
    "PP2, uneven": {"pp": 2, "pp_layers": [1, 3]},
    "TP2 x PP2 x DP2, interleaved zero-bubble": {"tp": 2, "pp": 2, "dp": 2, "vp": 2, "pp_schedule": "zero-bubble"},
    "CP2 x PP2, zero-bubble": {"cp": 2, "pp": 2, "pp_schedule": "zero-bubble"},
    "DP2, optimizer": {"dp": 2, "data_parallel": "optimizer"},
    "TP2 x DP2, optimizer": {"tp": 2, "dp": 2, "data_parallel": "optimizer"},
    "PP2 x DP2, optimizer": {"pp": 2, "dp": 2, "data_parallel": "optimizer"},
    "DP2, plain": {"dp": 2, "data_parallel": "plain"},
    "TP2 x DP2, plain": {"tp": 2, "dp": 2, "data_parallel": "plain"},
    "CP2 x DP2, plain": {"cp": 2, "dp": 2, "data_parallel": "plain"},
    "TP2 x DP4, hybrid": {"tp": 2, "dp": 4, "data_parallel": "hybrid", "nodes": 2},
    "CP2 x PP2 x DP2, hybrid": {"cp": 2, "pp": 2, "dp": 2, "data_parallel": "hybrid", "nodes": 4},
    "PP2 x DP2, plain, zero-bubble": {"pp": 2, "dp": 2, "data_parallel": "plain", "pp_schedule": "zero-bubble"},
    "DP4, hybrid": {"dp": 4, "data_parallel": "hybrid", "nodes": 2},
    "CP2 x DP2, hybrid": {"cp": 2, "dp": 2, "data_parallel": "hybrid", "nodes": 2},
    "CP2 x TP2 x PP2": {"cp": 2, "tp": 2, "pp": 2},
    "CP2 x TP2 x PP2 x DP2": {"cp": 2, "tp": 2, "pp": 2, "dp": 2},
}
TIED: dict[str, dict[str, Any]] = {"PP2, tied": {"pp": 2}}
"""Of models whose embedding is also the head, which the first and the last stage then both hold."""
ALONE: dict[str, dict[str, Any]] = {"one process": {}, "one process, tied": {}}
LOSS, GRAD_NORM, WEIGHTS = 1e-5, 1e-5, 1e-4
"""How far a training may be from one process's, relative."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One training of the matrix."""

    layout: str
    family: str
    packing: bool
    """Whether several chats share a sequence."""
    micro_batches: int
    """Of a step, on each data rank."""

    def __str__(self) -> str:
        packed = "packed" if self.packing else "not packed"
        return f"{self.layout}, {self.family}, {packed}, {self.micro_batches} micro-batches"

    @property
    def given(self) -> dict[str, Any]:
        """The layout's fields."""
        return (ALONE | LAYOUTS | TIED)[self.layout]

    @property
    def is_tied(self) -> bool:
        return self.layout in (*TIED, "one process, tied")

    @property
    def is_zero_bubble(self) -> bool:
        return self.given.get("pp_schedule") == "zero-bubble"

    @property
    def in_step(self) -> int:
        """Micro-batches of a step on all data ranks together."""
        return self.micro_batches * self.given.get("dp", 1)

    @property
    def alone(self) -> "Cell":
        """The training in one process that this one has to equal: of the same global batch."""
        layout = "one process, tied" if self.is_tied else "one process"
        return replace(self, layout=layout, micro_batches=self.in_step)


def cells(layout: str) -> list[Cell]:
    """All that are trained in a layout."""
    counts = (4, 8) if (LAYOUTS | TIED)[layout].get("pp", 1) > 1 else (1, 4)
    return [Cell(layout, family, packing, n) for n in counts for packing in (True, False) for family in FAMILIES]


def in_turn() -> list[Cell]:
    """One of each layout of up to eight ranks: family and packing take turns; two have many micro-batches, more few."""
    found = []
    for number, (layout, given) in enumerate((LAYOUTS | TIED).items()):
        num_ranks = math.prod(given.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))
        few, many = cells(layout)[:4], cells(layout)[4:]
        if num_ranks <= 8:
            found.append((many if num_ranks == 2 else few)[number % 4])
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two trainings are apart, relative."""

    loss: float
    """The worst step's."""
    grad_norm: float
    """The worst step's, before clipping. AdamW makes much the same step of a gradient that is twice as long."""
    weights: float
    """The worst tensor's after the last step, by L2."""
    tensor: str
    """Which that is."""

    @property
    def is_small(self) -> bool:
        """Whether it is no more than rounding; False where a training came to no number."""
        return self.loss <= LOSS and self.grad_norm <= GRAD_NORM and self.weights <= WEIGHTS


Run = tuple[Job, list[dict[str, Any]]]


class Matrix:
    """Trains cells in a folder; models, chats and the trainings in one process are made once."""

    def __init__(self, folder: Path, steps: int = RECIPE.steps):
        self.folder, self.steps = folder, steps
        self.chats = make_chats(folder / "chats")
        self._alone: dict[Cell, Run] = {}

    def job(self, cell: Cell, run: Path) -> Job:
        """The training of a cell into a run folder."""
        global_batch = MICRO_BATCH * cell.in_step
        recipe = replace(RECIPE, seq_len=SEQ_LEN, global_batch=global_batch, steps=self.steps, packing=cell.packing)
        return make_job(self._model(cell), self.chats, run, recipe, micro_batch=MICRO_BATCH, **cell.given)

    def alone(self, cell: Cell) -> Run:
        """The training in one process that a cell has to equal."""
        alone = cell.alone
        if alone not in self._alone:
            job = self.job(alone, self.folder / str(alone))
            self._alone[alone] = job, run_job(job)
        return self._alone[alone]

    def difference(self, cell: Cell, run: Path) -> Difference:
        """Train a cell into a run folder, and compare it with one process."""
        job = self.job(cell, run)
        preflight(job)
        return compare((job, run_job(job)), self.alone(cell))

    def _model(self, cell: Cell) -> Path:
        """transformers' random model of the cell's family, every parameter of it."""
        path = self.folder / (f"{cell.family}, tied" if cell.is_tied else cell.family)
        if not path.exists():
            theirs(FAMILIES[cell.family], tie_word_embeddings=cell.is_tied, **SIZES).save_pretrained(path)
            manifest.write(path, "checkpoint", {})
        return path


def compare(found: Run, expected: Run) -> Difference:
    """A training and the one that it has to equal."""
    loss = (losses(found[1]) / losses(expected[1]) - 1).abs().max()
    norms = (np.array([line["grad_norm"] for line in lines]) for _, lines in (found, expected))
    grad_norm = np.abs(np.divide(*norms) - 1).max()
    ours, reference = (open_source(job.run / "weights") for job, _ in (found, expected))
    assert sorted(ours.keys()) == sorted(reference.keys())
    weights = {key: relative(ours.read(key), reference.read(key)) for key in reference.keys()}  # noqa: SIM118
    tensor = max(weights, key=lambda key: math.inf if math.isnan(weights[key]) else weights[key])
    return Difference(float(loss), float(grad_norm), weights[tensor], tensor)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The L2 norm of the difference over that of the reference."""
    return float((ours - reference).norm() / reference.norm())


def make_chats(prefix: Path) -> Path:
    """A dataset of chats of 6 to 60 tokens, of which the assistant says the last two thirds."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(6, 61, CHATS)
    # Each token follows from the one before, with noise, so that there is something to learn.
    tokens = np.cumsum(rng.integers(1, 4, sizes.sum())) * 7 % VOCAB
    roles = np.concatenate([np.where(np.arange(size) < size // 3, USER, ASSISTANT) for size in sizes])
    for path, dtype, values in ((prefix, np.dtype(np.uint16), tokens), (suffixed(prefix, ".roles"), DTYPE, roles)):
        with Writer(path, dtype) as writer:
            writer.add(values, sizes)
    return prefix

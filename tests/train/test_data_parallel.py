"""The kinds of data parallelism: each trains as one process, goes on to the bit, and talks as seldom as it should."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job
from torch.utils._python_dispatch import TorchDispatchMode

from llmpipe.checkpoint.formats import open_source
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel import data
from llmpipe.parallel.processes import run_ranks
from llmpipe.train.job import Job
from llmpipe.train.setup import prepare

Run = tuple[Job, list[dict]]
SHORT = replace(RECIPE, steps=6)
TWO_NODES = {"data_parallel": "hybrid", "nodes": 2, "dp": 4}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"data_parallel": "plain", "dp": 2},
    "optimizer": {"data_parallel": "optimizer", "dp": 2},
    "hybrid": TWO_NODES,
}


@pytest.fixture(scope="module")
def trained(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The training of a layout, run once; "alone" is one process."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            layout = {"micro_batch": 1, **KINDS.get(name, {})}
            job = make_job(checkpoint, dataset, tmp_path_factory.mktemp("run"), SHORT, **layout)
            runs[name] = job, run_job(job)
        return runs[name]

    return run


def assert_same_training(found: Run, expected: Run, weights: float) -> None:
    torch.testing.assert_close(losses(found[1]), losses(expected[1]), rtol=1e-5, atol=0)
    ours, reference = (open_source(job.run / "weights") for job, _ in (found, expected))
    for key in reference.keys():  # noqa: SIM118
        difference = ours.read(key) - reference.read(key)
        assert difference.norm() <= weights * reference.read(key).norm(), key


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_resumes_bit_identical(name: str, trained, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", SHORT, micro_batch=1, **KINDS[name])
    run_job(replace(job, exit_at_step=3))
    assert not (job.run / "run.json").exists()
    lines = run_job(job)
    whole, expected = trained(name)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert_same_weights(whole.run / "weights", job.run / "weights")


def test_resumes_from_one_kind_into_another(trained, checkpoint, dataset, tmp_path) -> None:
    course = {1: {"dp": 2}, 2: KINDS["optimizer"], 3: KINDS["hybrid"], 4: KINDS["plain"], 6: {"tp": 2}}
    for step, layout in course.items():
        job = make_job(checkpoint, dataset, tmp_path / "run", SHORT, micro_batch=1, **layout)
        lines = run_job(replace(job, exit_at_step=step))
        assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert_same_training((job, lines), trained("alone"), weights=1e-5)


@pytest.mark.parametrize("name", ["plain", "hybrid"])
def test_copies_are_written_once(name: str, trained) -> None:
    sizes = []
    for job, _ in (trained(name), trained("alone")):
        (checkpoint,) = job.checkpoints.glob("step-*")
        sizes.append(sum(path.stat().st_size for path in checkpoint.glob("*.distcp")))
    tensors = open_source(trained("alone")[0].run / "weights")
    total = sum(tensors.read(key).numel() for key in tensors.keys())  # noqa: SIM118
    assert all(size > 3 * 4 * total for size in sizes)  # weights and AdamW's two, in fp32
    assert sizes[0] < 1.5 * sizes[1]  # more files, no copies


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_plain_rounds_as_fully_sharded(precision, checkpoint, dataset, tmp_path) -> None:
    """The gradients of two ranks' only micro-batch have one sum, whoever adds them: the same losses to the bit."""
    recipe = replace(SHORT, steps=4, precision=precision)
    layouts = {"full": {"dp": 2}, **{name: KINDS[name] for name in ("plain", "optimizer")}}
    found = {
        name: losses(run_job(make_job(checkpoint, dataset, tmp_path / name, recipe, micro_batch=4, **layout)))
        for name, layout in layouts.items()
    }
    assert torch.equal(found["plain"], found["full"]) and torch.equal(found["optimizer"], found["full"])


def held_between_steps(job: Job) -> int:
    """Bytes of this rank's weights and optimizer state after a step."""
    trainer = prepare(job)
    optimizer = trainer.optimizer
    trainer.pipeline.forward_backward(trainer.loader.step(0), torch.ones(()))
    optimizer.reduce_and_clip()
    optimizer.adamw.step()
    optimizer.adamw.zero_grad()
    state = [value for of_one in optimizer.adamw.state.values() for value in of_one.values() if value.ndim]
    tensors = [*optimizer.parameters.values(), *map(data.local, trainer.model.parameters()), *state]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("layout", "each"),
    [
        ({"dp": 2}, 12),  # fp32 weights and AdamW's two
        (KINDS["optimizer"], 12),
        (KINDS["plain"], 2 * (12 + 2)),  # and the bf16 copy that it computes with, on each of two ranks
        (TWO_NODES, 2 * 12),
    ],
    ids=["full", "optimizer", "plain", "hybrid"],
)
def test_what_all_ranks_hold_between_steps(layout, each, checkpoint, dataset, tmp_path) -> None:
    source = open_source(checkpoint)
    num_parameters = sum(source.read(key).numel() for key in source.keys())  # noqa: SIM118
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(SHORT, precision="bf16"), micro_batch=1, **layout)
    held = sum(run_ranks(held_between_steps, job.layout.processes, job))
    assert held == pytest.approx(each * num_parameters, rel=1e-3)  # FSDP2 pads 203 rows to 204


def loss_of_zeros(job: Job) -> float:
    """The mean loss of a micro-batch once all weights are 0, after a forward pass with others."""
    trainer = prepare(job)
    *inputs, weights = next(iter(trainer.loader.step(0).micro_batches()))
    with torch.no_grad():
        trainer.model[0](*inputs, weights)
        for parameter in trainer.optimizer.parameters.values():
            parameter.zero_()
        trainer.optimizer.into_model()
        return float(trainer.model[0](*inputs, weights) / weights.sum())


@pytest.mark.parametrize("layout", [{"dp": 2}, *KINDS.values()], ids=["full", *KINDS])
def test_no_kind_computes_with_weights_of_before(layout, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(SHORT, precision="bf16"), micro_batch=1, **layout)
    for loss in run_ranks(loss_of_zeros, job.layout.processes, job):
        assert loss == pytest.approx(math.log(203), rel=1e-5)  # all tokens of the vocabulary are as likely


class Collectives(TorchDispatchMode):
    """Counts torch's collective operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_a_step(job: Job) -> dict[str, int]:
    """Those of the second step from its batch to its gradient: the first one makes what all others take again."""
    trainer = prepare(job)
    for step in range(2):
        with Collectives() as collectives:
            batch = trainer.loader.step(step)
            assert batch.tokens.shape[0] == 4
            trainer.pipeline.forward_backward(batch, torch.ones(()))
            trainer.optimizer.reduce_and_clip()
        trainer.optimizer.skip()
    return dict(collectives.counts)


NORM = 1
"""All-reduces of the gradient's norm."""
UNITS = 4 + 1
"""What FSDP2 gathers and reduces at once: each of the model's layers, and the rest."""


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"data_parallel": "plain", "dp": 2}, {"allreduce": NORM + 1}),
        (
            {"data_parallel": "optimizer", "dp": 2},
            {"allgather_base": UNITS, "reduce_scatter_base": UNITS, "allreduce": NORM},
        ),
        (  # layers are gathered in each forward and backward, and no gradient is kept whole
            {"data_parallel": "full", "dp": 2},
            {"allgather_base": 4 * (UNITS + 4), "reduce_scatter_base": 4 * UNITS, "allreduce": NORM},
        ),
        (  # copies are summed once
            {**TWO_NODES, "dp": 4},
            {"allgather_base": 4 * (UNITS + 4), "reduce_scatter_base": 4 * UNITS, "allreduce": NORM + UNITS},
        ),
    ],
    ids=["plain", "optimizer", "full", "hybrid"],
)
def test_what_is_sent_in_a_step_of_four_micro_batches(layout, expected, checkpoint, dataset, tmp_path) -> None:
    job = make_job(
        checkpoint, dataset, tmp_path / "run", replace(SHORT, global_batch=4 * layout["dp"]), micro_batch=1, **layout
    )
    for counts in run_ranks(collectives_of_a_step, job.layout.processes, job):
        assert counts == expected


def sum_in_buckets() -> list[list[float]]:
    """What `plain` makes of gradients of 3, 2, 1 and 9 elements with buckets of at most 5."""
    data._BUCKET = 5
    group = torch.distributed.group.WORLD
    assert group
    rank = torch.distributed.get_rank()
    tensors = [torch.arange(size, dtype=torch.float32).view(-1, 1) + 10 * rank for size in (3, 2, 1, 9)]
    data._sum(group, tensors)
    return [tensor.flatten().tolist() for tensor in tensors]


def test_buckets_hold_every_gradient() -> None:
    for found in run_ranks(sum_in_buckets, 2):
        assert found == [[2 * i + 10.0 for i in range(size)] for size in (3, 2, 1, 9)]


@pytest.mark.parametrize(
    ("layout", "wrong", "works"),
    [
        ({"gpus_per_node": 8}, "tp 1 x cp 1 x dp 8 are all on one", {"data_parallel": "full"}),
        ({"gpus_per_node": 4, "nodes": 2, "pp": 2}, "tp 1 x cp 1 x dp 4 are all on one", {"data_parallel": "full"}),
        ({"gpus_per_node": 2, "nodes": 3, "tp": 3}, "= 6 do not fill evenly", {"tp": 1}),
        ({"gpus_per_node": 2, "nodes": 3, "pp": 2}, "= 3 do not fill evenly", {"data_parallel": "full"}),
        ({"gpus_per_node": 4, "nodes": 2, "tp": 4}, "leaves nothing to share out", {"data_parallel": "plain"}),
    ],
)  # fmt: skip
def test_hybrid_that_cannot_be_is_refused_naming_what_would_work(layout, wrong, works) -> None:
    given = {"data_parallel": "hybrid", **layout}
    with pytest.raises(UserError, match="hybrid shares parameters out inside each node") as error:
        Layout(**given).resolved().check_training()
    assert wrong in str(error.value) and "would work" in str(error.value)
    Layout(**{**given, **works}).resolved().check_training()

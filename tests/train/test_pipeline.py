"""Pipeline schedules and virtual stages: as in one process, resumed to the bit, and refused where they cannot work."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import RECIPE, ZERO_BUBBLE, assert_same_weights, losses, make_job, run_job
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.data.batches.batch import Batch
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.model.load import fill
from llmpipe.model.rank import RankModel
from llmpipe.parallel.data import distribute, local
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.pipeline import SCHEDULES, Pipeline
from llmpipe.parallel.processes import run_ranks
from llmpipe.parallel.schedules import ONE_STAGE_EACH, check_micro_batches, schedule_name, takes
from llmpipe.recipe import BatchRamp
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight

MODELS = {"llama": "llama", "falcon": "falcon, 4 heads"}  # grouped queries; one KV head, and tied embeddings
NUM_LAYERS = 6
PIPELINED = replace(RECIPE, steps=4, global_batch=24, eval_every=3, eval_batches=1)
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pp4, uneven, 4 micro-batches": ("falcon", {"pp": 4, "pp_layers": [2, 1, 1, 2], "micro_batch": 6}),
    "pp4, uneven, 8 micro-batches": ("llama", {"pp": 4, "pp_layers": [1, 2, 2, 1], "micro_batch": 3}),
    "pp2 x vp3": ("falcon", {"pp": 2, "vp": 3}),
    "pp2 x vp3, 3 micro-batches": ("llama", {"pp": 2, "vp": 3, "micro_batch": 8}),
}
UNEVEN_ZERO_BUBBLE = {"pp": 2, "vp": 2, "pp_schedule": "zero-bubble", "pp_layers": [2, 1, 2, 1]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    made = {}
    for name, twin in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        theirs(twin, vocab_size=203, num_hidden_layers=NUM_LAYERS).save_pretrained(made[name])
        manifest.write(made[name], "checkpoint", {})
    return made


@pytest.fixture(scope="module")
def alone(models, dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Job, list[dict]]]:
    """Each family's training in one process."""
    jobs = {name: make_job(models[name], dataset, tmp_path_factory.mktemp("alone"), PIPELINED) for name in models}
    return {name: (job, run_job(job)) for name, job in jobs.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(pytest.param(*case, id=name) for name, case in LAYOUTS.items()),
        pytest.param("falcon", UNEVEN_ZERO_BUBBLE, id="pp2 x vp2, zero-bubble, uneven", marks=ZERO_BUBBLE),
    ],
)
def test_every_schedule_trains_as_one_process(name, layout, models, alone, dataset, tmp_path) -> None:
    job = make_job(models[name], dataset, tmp_path / "run", PIPELINED, **layout)
    preflight(job)
    lines = run_job(job)
    assert_same_training(job, lines, *alone[name])
    assert_rank_files(job)


def assert_same_training(job: Job, lines: list[dict], reference: Job, expected: list[dict]) -> None:
    torch.testing.assert_close(losses(lines), losses(expected), rtol=1e-5, atol=0)
    evaluated = [[line["eval_loss"] for line in told if "eval_loss" in line] for told in (lines, expected)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5) and len(evaluated[0]) == 1
    ours, alone = open_source(job.run / "weights"), open_source(reference.run / "weights")
    for key in alone.keys():  # noqa: SIM118
        assert (ours.read(key) - alone.read(key)).norm() <= 1e-4 * alone.read(key).norm(), key


def assert_rank_files(job: Job) -> None:
    """Each pipeline rank's file holds its layers; a tied embedding is in the first and the last one, the same bits."""
    layout, embeddings = job.layout, []
    for pp in range(layout.pp):
        with safe_open(job.run / f"weights/tp0-pp{pp}.safetensors", "pt") as file:
            keys = [*file.keys()]
            if "embedding.weight" in keys:
                embeddings.append(file.get_tensor("embedding.weight"))
            assert file.metadata().get("vp", "1") == str(layout.vp)
        numbers = {int(key.split(".")[1]) for key in keys if key.startswith("layers.")}
        assert sorted(numbers) == layout.stages.layers_of(NUM_LAYERS, pp)
        assert ("norm.weight" in keys) == (pp == layout.pp - 1)
    if "falcon" in job.model:
        assert len(embeddings) == 2 and torch.equal(*embeddings)


def test_virtual_stages_resume_bit_identical(models, dataset, tmp_path) -> None:
    layout = {"pp": 2, "vp": 3, "dp": 2}
    whole = make_job(models["falcon"], dataset, tmp_path / "whole", PIPELINED, **layout)
    half = make_job(models["falcon"], dataset, tmp_path / "half", PIPELINED, **layout)
    whole_lines = run_job(whole)
    run_job(replace(half, exit_at_step=2))
    assert not (half.run / "run.json").exists()
    assert [line["loss"] for line in run_job(half)] == [line["loss"] for line in whole_lines]
    assert_same_weights(whole.run / "weights", half.run / "weights")


@ZERO_BUBBLE
def test_virtual_stages_go_on_in_another_layout(models, alone, dataset, tmp_path) -> None:
    first = make_job(models["llama"], dataset, tmp_path / "run", PIPELINED, pp=2, vp=3, pp_schedule="zero-bubble")
    run_job(replace(first, exit_at_step=2))
    second = make_job(models["llama"], dataset, tmp_path / "run", PIPELINED, dp=2)
    assert_same_training(second, run_job(second), *alone["llama"])


def test_batches_that_grow_go_through_a_pipeline(models, dataset, tmp_path) -> None:
    """Another number of micro-batches is another schedule: 4, 4, 8, 12."""
    recipe = replace(PIPELINED, batch_ramp=BatchRamp(start=8, increment=8, samples=32), eval_every=0)
    reference = make_job(models["llama"], dataset, tmp_path / "alone", recipe)
    job = make_job(models["llama"], dataset, tmp_path / "run", recipe, pp=2, vp=3)
    preflight(job)
    torch.testing.assert_close(losses(run_job(job)), losses(run_job(reference)), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match=r"1 micro-batches of 8, fewer than its 2 stages: batch_ramp 16 would work"):
        preflight(replace(job, layout=replace(job.layout, micro_batch=8), output=str(tmp_path / "anew")))


class Counted(TorchDispatchMode):
    """Counts the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def batch_of(step: int, count: int, dp_rank: int) -> Batch:
    """`count` micro-batches of 32 tokens, two documents in each."""
    generator = torch.Generator().manual_seed(100 * step + dp_rank)
    tokens, labels = torch.randint(VOCAB, (2, count, 1, 32), generator=generator)
    bounds = torch.tensor([[0, 3 + i, 32] for i in range(count)], dtype=torch.int32)
    ones = torch.ones(count, 1, 32)
    return Batch(tokens, labels, ones, ones.bool(), bounds, (32,) * count)


def second_step(layout: Layout, count: int, precision: torch.dtype) -> tuple[dict[str, np.ndarray], Counter[str]]:
    """One rank's gradient of a step of `count` micro-batches that follows another, and the collectives of that step."""
    reference = theirs("falcon, 4 heads", num_hidden_layers=NUM_LAYERS)
    shape = shape_of(reference)
    weights = in_our_names(reference.state_dict(), shape)
    source = SimpleNamespace(shape=shape, read=lambda key, slices: weights[key][slices])
    groups = make_groups(layout, torch.device("cpu"))
    with torch.device("meta"):
        model = RankModel(shape, groups.tp, layout.stages, groups.at.pp)
    for stage in model:
        distribute(stage, groups, precision, torch.float32)
    parts = {key: local(parameter) for key, parameter in model.named_parameters()}
    fill(parts, source, groups.tp, layout.shards, groups.shard_rank)
    pipeline, total_weight = Pipeline(model, groups, 32, shape.hidden, precision), torch.tensor(64.0 * count)
    pipeline.forward_backward(batch_of(0, count, groups.at.dp), total_weight)
    model.zero_grad()
    with Counted() as told:
        pipeline.forward_backward(batch_of(1, count, groups.at.dp), total_weight)
    return {key: local(parameter.grad).numpy() for key, parameter in model.named_parameters()}, told.counts


def in_layout(count: int, precision: torch.dtype, **given: Any) -> list[tuple[dict[str, np.ndarray], Counter[str]]]:
    layout = Layout(device="cpu", pp=2, **given)
    layout = replace(layout, gpus_per_node=2 * layout.tp * max(layout.dp, 1)).resolved()
    return run_ranks(second_step, layout.processes, layout, count, precision)


@pytest.mark.parametrize(
    ("schedule", "vp"),
    [
        ("1f1b", 1),
        ("gpipe", 1),
        ("interleaved", 3),
        pytest.param("zero-bubble", 1, marks=ZERO_BUBBLE),
        pytest.param("zero-bubble", 3, marks=ZERO_BUBBLE),
    ],
)
def test_weights_are_gathered_and_gradients_reduced_once_a_step(schedule: str, vp: int) -> None:
    for gradients, counts in in_layout(4, torch.float32, pp_schedule=schedule, vp=vp, dp=2):
        layers = {key.split(".")[1] for key in gradients if key.startswith("layers.")}
        assert len(layers) == NUM_LAYERS / 2
        # FSDP2 handles each layer together, and what else the first stage, or the last one, has.
        assert counts["_allgather_base_"] == counts["_reduce_scatter_base_"] == len(layers) + 1
        assert counts["send"] == 4 * (2 * vp - 1)  # forward to the next stage, and backward to the one before


@ZERO_BUBBLE
@pytest.mark.parametrize("ranks", [{"dp": 2}, {"tp": 2}], ids=["dp2", "tp2"])
def test_a_backward_pass_in_halves_is_a_whole_one_to_the_bit_and_talks_as_often(ranks: dict[str, int]) -> None:
    """In bf16, whose gradients are summed in fp32: also those that a zero-bubble schedule computes later."""
    whole = in_layout(6, torch.bfloat16, **ranks)
    halves = in_layout(6, torch.bfloat16, pp_schedule="zero-bubble", **ranks)
    for (expected, counts), (found, counts_of_halves) in zip(whole, halves, strict=True):
        assert all(np.array_equal(found[key], gradient) for key, gradient in expected.items())
        assert counts_of_halves == counts


class StageLike:
    """What torch's schedules ask of a stage when they are made."""

    def __init__(self, number: int, layout: Layout):
        self.stage_index, self.num_stages, self.group_size = number, layout.stages.count, layout.pp
        self.group_rank, self.is_last, self.submod = number % layout.pp, False, None


def torch_takes(layout: Layout, count: int) -> bool:
    stages = [StageLike(number, layout) for number in layout.stages.of_rank(0)]
    name = schedule_name(layout)
    try:
        SCHEDULES[name](stages[0] if name in ONE_STAGE_EACH else stages, count, loss_fn=torch.sum)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("schedule", "vp"), [("1f1b", 1), ("gpipe", 1), ("1f1b", 2), ("zero-bubble", 1)])
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_numbers_of_micro_batches_are_those_that_torch_takes(pp: int, schedule: Any, vp: int) -> None:
    layout = Layout(pp=pp, vp=vp, pp_schedule=schedule)
    for count in range(pp, 4 * pp + 1):
        assert takes(layout, count) == torch_takes(layout, count), count
    assert not any(takes(layout, count) for count in range(pp))  # some of its stages would only wait


def test_a_number_of_micro_batches_that_cannot_be_names_those_that_can() -> None:
    layout = Layout(gpus_per_node=4, pp=4, vp=2, micro_batch=2).resolved()
    assert check_micro_batches(layout, 16) == 8
    with pytest.raises(
        UserError,
        match=r"batch of 22 gives each pipeline 11 micro-batches of 2, which pp_schedule interleaved cannot share out"
        r" evenly over 2 rounds: global_batch 20 or 24 would work, or another micro_batch, dp or pp",
    ):
        check_micro_batches(layout, 22)
    with pytest.raises(UserError, match=r"3 micro-batches of 2, fewer than its 4 stages: global_batch 8 would work"):
        check_micro_batches(layout, 6)


@ZERO_BUBBLE
@pytest.mark.parametrize(("key", "value", "works"), [("recompute", "full", "off"), ("compile", True, "false")])
def test_zero_bubble_is_refused_with_what_it_would_do_twice(key, value, works, checkpoint, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, **{key: value})
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe, pp=2, pp_schedule="zero-bubble")
    with pytest.raises(
        UserError, match=f"zero-bubble .* {key} is {str(value).lower()}: {key}: {works} in the recipe would work"
    ):
        preflight(job)

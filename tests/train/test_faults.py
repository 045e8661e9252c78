"""Steps that are skipped, and going back: which, by all ranks, and with what weights training goes on."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import RECIPE, assert_same_weights, make_job, run_job, trained_by_transformers

from llmpipe.checkpoint.formats import open_source
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.parallel.data import local
from llmpipe.parallel.pipeline import Pipeline
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import LossScale, Recipe, Spike
from llmpipe.train import lease, loop
from llmpipe.train.faults import NOT_FINITE, OVERFLOW, SPIKE, Watch
from llmpipe.train.job import Job

SHORT = replace(RECIPE, steps=8, save_every=2, keep=9)


def with_losses(change: Callable[[int, float], float]) -> None:
    """In this rank, the loss that a step's gradient comes with is changed; (step from 1, loss) → loss."""
    original = loop.gradient

    def changed(trainer: loop.Trainer, step: int) -> tuple[float, float]:
        loss, grad_norm = original(trainer, step)
        return change(step + 1, loss), grad_norm

    loop.gradient = changed


def train_bad(job: Job, bad: list[int], value: float = math.nan) -> None:
    with_losses(lambda step, loss: value if step in bad else loss)
    loop.train(job)


def lines_of(job: Job) -> list[dict]:
    return [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]


def test_a_skipped_step_is_none_in_transformers_either(checkpoint, dataset, tmp_path) -> None:
    """Its samples are passed over, asked or not: what comes later is not moved."""
    asked = make_job(checkpoint, dataset, tmp_path / "asked", recipe=replace(SHORT, skip_steps=[3, 4]), tp=2)
    lines = run_job(asked)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["skipped"] for line in lines] == [None, None, "asked", "asked", None, None, None, None]
    assert lines[2]["loss"] is None and lines[-1]["skipped_steps"] == 2

    model, losses = trained_by_transformers(checkpoint, dataset, lines)
    for line, loss in zip(lines, losses.tolist(), strict=True):
        assert line["skipped"] or line["loss"] == pytest.approx(loss, rel=1e-5)
    ours, family = open_source(asked.run / "weights"), FAMILIES["llama"]
    for key in ours.keys():  # noqa: SIM118
        theirs = model.state_dict()[family.hf_name(key, ours.shape)]
        torch.testing.assert_close(ours.read(key), theirs, rtol=1e-3, atol=2e-5)

    found = make_job(checkpoint, dataset, tmp_path / "found", recipe=SHORT, tp=2)
    run_ranks(train_bad, 2, found, [3, 4], math.inf)
    assert [line["skipped"] for line in lines_of(found)] == [None, None, NOT_FINITE, NOT_FINITE, None, None, None, None]
    assert_same_weights(asked.run / "weights", found.run / "weights")


def train_with_a_bad_gradient(job: Job, rank: int, step: int) -> None:
    """One rank's part of the gradient is no number: its own one, or of what FSDP2 has summed already."""
    original, calls = Pipeline.forward_backward, count(1)

    def poisoned(pipeline: Pipeline, *given: Any) -> torch.Tensor:
        loss = original(pipeline, *given)
        if next(calls) == step and dist.get_rank() == rank:
            gradient = next(pipeline.stages.parameters()).grad
            assert gradient is not None
            local(gradient).view(-1)[0] = math.nan
        return loss

    Pipeline.forward_backward = poisoned  # type: ignore[method-assign]
    loop.train(job)


@pytest.mark.parametrize(
    ("layout", "rank"),
    [({"dp": 2}, 1), ({"dp": 2, "data_parallel": "plain"}, 1), ({"pp": 2}, 0), ({"tp": 2}, 1)],
    ids=str,
)
def test_what_one_rank_alone_has_wrong_all_skip(layout, rank, checkpoint, dataset, tmp_path) -> None:
    found = make_job(checkpoint, dataset, tmp_path / "found", recipe=replace(SHORT, steps=4), **layout)
    run_ranks(train_with_a_bad_gradient, 2, found, rank, 3)
    assert [line["skipped"] for line in lines_of(found)] == [None, None, NOT_FINITE, None]
    asked = replace(found, recipe=replace(found.recipe, skip_steps=[3]), output=str(tmp_path / "asked"))
    asked.run.mkdir()
    run_job(asked)
    assert_same_weights(asked.run / "weights", found.run / "weights")


def saved(job: Job) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in job.checkpoints.glob("*/manifest.json"))


@pytest.mark.parametrize(("keep", "left"), [(9, [2, 6, 8]), (1, [8])])
def test_after_bad_steps_in_a_row_it_goes_back_and_passes_over_the_samples(
    keep, left, checkpoint, dataset, tmp_path
) -> None:
    recipe = replace(SHORT, roll_back_after=2, keep=keep)
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe, dp=2)
    run_ranks(train_bad, 2, job, [4, 5])  # the checkpoints of steps 2 and 4 stand: the one of 2 is before the bad steps
    skipped = [None, None, "rolled back", NOT_FINITE, NOT_FINITE, None, None, None]
    assert [(line["step"], line["skipped"]) for line in lines_of(job)] == list(enumerate(skipped, start=1))
    assert lines_of(job)[-1]["skipped_steps"] == 3
    assert saved(job) == left
    asked = make_job(checkpoint, dataset, tmp_path / "asked", recipe=replace(recipe, skip_steps=[3, 4, 5]), dp=2)
    run_job(asked)
    assert_same_weights(asked.run / "weights", job.run / "weights")


def test_it_never_goes_back_to_what_it_went_back_from(checkpoint, dataset, tmp_path) -> None:
    """The checkpoint of step 8 is before the second bad steps, but of the course that step 9 ended."""
    recipe = replace(SHORT, steps=14, save_every=4, roll_back_after=3)
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe)
    run_ranks(train_bad, 1, job, [7, 8, 9, 11, 12, 13])
    rolled, bad = "rolled back", NOT_FINITE
    skipped = [None] * 4 + [rolled, rolled, bad, bad, bad, rolled, bad, bad, bad, None]
    assert [line["skipped"] for line in lines_of(job)] == skipped
    assert [line["skipped_steps"] for line in lines_of(job)] == [0, 0, 0, *range(10), 9]
    assert saved(job) == [4, 14]
    asked = make_job(checkpoint, dataset, tmp_path / "asked", recipe=replace(recipe, skip_steps=[*range(5, 14)]))
    run_job(asked)
    assert_same_weights(asked.run / "weights", job.run / "weights")


def go_back_while_another_takes_over(job: Job) -> None:
    load = loop.state.load

    def load_late(*given: Any) -> int:
        shutil.copy(job.live, job.run / "before")
        (job.run / lease.NAME).unlink()
        return load(*given)

    loop.state.load = load_late
    train_bad(job, [4, 5])


def test_who_loses_the_run_while_it_goes_back_changes_no_metrics(checkpoint, dataset, tmp_path, monkeypatch) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, roll_back_after=2))
    with lease.hold(job.run, 0) as token:
        monkeypatch.setenv(lease.TOKEN, token)
        with pytest.raises(UserError, match="was taken over"):
            run_ranks(go_back_while_another_takes_over, 1, job)
    assert job.live.read_bytes() == (job.run / "before").read_bytes()


@pytest.mark.parametrize(
    ("bad", "text"),
    [([1, 2], "no checkpoint is from before them"), ([4, 5, 6, 7], "after going back as well")],
)
def test_where_going_back_cannot_help_it_ends(bad, text, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, roll_back_after=2))
    with pytest.raises(
        UserError, match=rf"step {bad[-1]}: 2 steps in a row .* {text}: .* steps {bad[-2]} to {bad[-1]}"
    ):
        run_ranks(train_bad, 1, job, bad)
    assert not (job.run / "weights").exists()


def stop_after_5(job: Job, bad: list[int]) -> None:
    loop.asked_to_stop = lambda run: len((run / "live.jsonl").read_text().splitlines()) == 4
    train_bad(job, bad)


def test_a_run_that_stops_among_bad_steps_goes_on_alike(checkpoint, dataset, tmp_path) -> None:
    recipe = replace(SHORT, roll_back_after=3, spike=Spike(factor=3, window=2))
    whole = make_job(checkpoint, dataset, tmp_path / "whole", recipe=recipe)
    run_ranks(train_bad, 1, whole, [4, 5, 6], 1e3)
    assert [line["skipped"] for line in lines_of(whole)][2:6] == ["rolled back", SPIKE, SPIKE, SPIKE]
    parts = make_job(checkpoint, dataset, tmp_path / "parts", recipe=recipe)
    run_ranks(stop_after_5, 1, parts, [4, 5, 6])
    run_ranks(train_bad, 1, parts, [4, 5, 6], 1e3)
    told = [[line["skipped"], line["loss"], line["skipped_steps"]] for line in lines_of(parts)]
    # The first attempt's losses were nan.
    assert [line[0] for line in told][2:6] == ["rolled back", NOT_FINITE, NOT_FINITE, SPIKE]
    assert_same_weights(whole.run / "weights", parts.run / "weights")


def test_steps_that_are_to_be_skipped_are_not_in_the_checkpoint_that_is_resumed(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(SHORT, steps=6))
    run_job(job)
    more = replace(job, recipe=replace(SHORT, steps=6, skip_steps=[5]))
    assert job.is_finished() and not more.is_finished()
    (job.run / "run.json").unlink()
    assert [line["skipped"] for line in run_job(more)] == [None] * 4 + ["asked", None]
    fresh = make_job(checkpoint, dataset, tmp_path / "fresh", recipe=replace(SHORT, steps=6, skip_steps=[5]))
    run_job(fresh)
    assert_same_weights(fresh.run / "weights", more.run / "weights")


def watch(**more: object) -> Watch:
    return Watch(Recipe(seq_len=8, global_batch=1, steps=9, lr=1e-3, **more))  # type: ignore[arg-type]


def test_a_spike_is_above_its_factor_times_the_median_of_the_steps_that_were_taken() -> None:
    judge = watch(spike=Spike(factor=2, norm_factor=10, window=3)).judge
    assert [judge(step, loss, 1.0) for step, loss in enumerate((5.0, 50.0, 1.0), 1)] == [None] * 3  # too few to tell
    assert judge(4, 10.0, 1.0) is None  # the median of 5, 50 and 1 is 5; now of 50, 1 and 10 it is 10
    assert judge(5, 20.1, 1.0) == SPIKE
    assert judge(6, 20.0, 10.1) == SPIKE
    assert judge(7, 20.0, 10.0) is None  # those of steps 5 and 6 are not among the steps before


def test_without_a_rule_only_what_is_no_number_is_skipped() -> None:
    judge = watch().judge
    assert [judge(step, 10.0**step, 1.0) for step in range(1, 9)] == [None] * 8
    assert judge(9, math.nan, 1.0) == NOT_FINITE and judge(10, 1.0, math.inf) == NOT_FINITE


def test_overflows_while_the_loss_scale_is_sought_are_no_reason_to_go_back() -> None:
    found = watch(roll_back_after=1)
    assert found.judge(1, 5.0, math.inf, scale_can_shrink=True) == OVERFLOW and not found.has_to_go_back
    assert found.judge(2, 5.0, math.inf) == NOT_FINITE and found.has_to_go_back


def test_it_goes_back_to_before_the_overflows_that_bad_steps_began_with() -> None:
    """Until the scale cannot shrink, a fault of the weights looks like one of the scale."""
    found = watch(roll_back_after=5)
    assert found.judge(90, 5.0, 1.0) is None and found.first_skipped == 0
    assert [found.judge(step, 5.0, math.nan, scale_can_shrink=True) for step in range(91, 108)] == [OVERFLOW] * 17
    resumed = watch(roll_back_after=5)
    resumed.load(found.state())
    assert [resumed.judge(step, 5.0, math.nan) for step in range(108, 113)] == [NOT_FINITE] * 5
    assert resumed.has_to_go_back and resumed.first_skipped == 91
    assert resumed.judge(113, 5.0, 1.0) is None and resumed.first_skipped == 0


@pytest.mark.parametrize(("bad_steps", "first"), [(2, 4), (0, 0)])
def test_what_older_checkpoints_remember_of_bad_steps_is_taken_over(bad_steps: int, first: int) -> None:
    found = watch()
    found.load({"taken": [], "bad_steps": bad_steps, "first_bad": 4, "went_back": False})
    assert (found.bad_steps, found.first_skipped) == (bad_steps, first)


def test_a_loss_that_is_no_number_is_no_overflow_of_the_scale(checkpoint, dataset, tmp_path) -> None:
    """The loss is summed up in fp32, and its forward pass knows of no scale: a smaller one would not help."""
    recipe = replace(SHORT, precision="fp16", loss_scale=LossScale(initial=64.0, window=2))
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe)
    run_ranks(train_bad, 1, job, [3, 4])
    assert [line["skipped"] for line in lines_of(job)] == [None, None, NOT_FINITE, NOT_FINITE, None, None, None, None]
    # two good steps in a row make it grow, whatever stands between them
    assert [line["loss_scale"] for line in lines_of(job)] == [64, 64, 128, 128, 128, 128, 256, 256]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("skip_steps", [0], "steps count from 1"),
        ("roll_back_after", 0, "has to be 1 or more"),
        ("keep", 0, "has to be 1 or more"),
        ("save_minutes", -1.0, "has to be 0 or more"),
    ],
)
def test_recipe_keys_that_make_no_sense_are_refused(key: str, value: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        watch(**{key: value})
    with pytest.raises(UserError, match=r"spike\.factor is 0\.5, but has to be above 1, or 0"):
        Spike(factor=0.5)

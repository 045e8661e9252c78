"""fp16's loss scale: Megatron's rule by hand, and in a training of several ranks."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import LossScale
from llmpipe.train.loss_scale import DynamicScale

RULE = LossScale(initial=16, min=1, window=3, hysteresis=2)
# Of megatron-core's DynamicGradScaler, from its rule: "o" overflows. Two overflows are borne in all between two times
# that the scale grows, and an overflow starts the count of good steps anew.
BY_HAND = [
    ("o", 16), ("o", 8), ("o", 4), ("g", 4), ("g", 4), ("g", 8), ("o", 8), ("g", 8), ("g", 8), ("o", 4), ("g", 4),
    ("g", 4), ("g", 8), ("g", 8), ("g", 8), ("g", 16), ("o", 16), ("o", 8), ("o", 4), ("o", 2), ("o", 1), ("o", 1),
    ("g", 1), ("g", 1), ("g", 2), ("o", 2), ("o", 1),
]  # fmt: skip


def test_the_scale_moves_as_megatrons() -> None:
    scale = DynamicScale(RULE)
    found = []
    for event, _ in BY_HAND:
        scale.update(event == "g")
        found.append((event, scale.value))
    assert found == BY_HAND


def test_it_goes_on_from_any_step() -> None:
    for middle in range(len(BY_HAND)):
        scale, other = DynamicScale(RULE), DynamicScale(RULE)
        for event, _ in BY_HAND[:middle]:
            scale.update(event == "g")
        other.load(scale.state())
        for event, value in BY_HAND[middle:]:
            other.update(event == "g")
            assert other.value == value


def test_megatrons_defaults() -> None:
    scale = DynamicScale(LossScale())
    scale.update(False)
    assert scale.value == 2**32
    scale.update(False)
    assert scale.value == 2**31
    for _ in range(999):
        scale.update(True)
    assert scale.value == 2**31
    scale.update(True)
    assert scale.value == 2**32


def test_without_a_rule_it_stays_1() -> None:
    scale = DynamicScale(None)
    scale.update(False)
    scale.update(True)
    assert scale.value == 1 and not scale.can_shrink


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"min": 0}, "0 < min <= initial has to hold"),
        ({"initial": 2, "min": 4}, "0 < min <= initial has to hold"),
        ({"window": 0}, "loss_scale.window is 0"),
        ({"hysteresis": 0}, "loss_scale.hysteresis is 0"),
        ({"growth": 1}, "growth has to be above 1"),
        ({"backoff": 1}, "backoff between 0 and 1"),
    ],
)
def test_rules_that_cannot_be(wrong: dict, error: str) -> None:
    with pytest.raises(UserError, match=error):
        LossScale(**wrong)


FP16 = replace(RECIPE, precision="fp16", loss_scale=LossScale(initial=2.0**26, window=4, hysteresis=1))


def test_all_ranks_skip_the_step_that_overflows_and_a_resumed_run_does_the_same(checkpoint, dataset, tmp_path) -> None:
    whole = make_job(checkpoint, dataset, tmp_path / "whole", FP16, pp=2, dp=2)
    lines = run_job(whole)
    scale, skipped = DynamicScale(FP16.loss_scale), 0
    for line in lines:
        assert line["loss_scale"] == scale.value
        scale.update(line["grad_norm"] is not None)
        skipped += line["grad_norm"] is None
        assert line["skipped_steps"] == skipped
    assert 2 <= skipped <= 10 and lines[0]["grad_norm"] is None  # 2²⁶ is too much, and what it grows to later too
    assert any(later["loss_scale"] > earlier["loss_scale"] for earlier, later in pairwise(lines))
    half = make_job(checkpoint, dataset, tmp_path / "half", replace(FP16, save_every=10), pp=2, dp=2)
    run_ranks(train_until_10, 4, half)
    (half.run / "stop").unlink()
    for resumed, line in zip(run_job(half), lines, strict=True):
        for key in ("step", "loss", "grad_norm", "loss_scale", "skipped_steps"):
            assert resumed[key] == line[key]
    assert_same_weights(whole.run / "weights", half.run / "weights")


@pytest.mark.parametrize("initial", [1.0, 2.0**12])
def test_fp16_follows_fp32(initial: float, checkpoint, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, steps=6)
    single = run_job(make_job(checkpoint, dataset, tmp_path / "fp32", recipe))
    scaled = replace(recipe, precision="fp16", loss_scale=LossScale(initial=initial))
    lines = run_job(make_job(checkpoint, dataset, tmp_path / "fp16", scaled, tp=2))
    torch.testing.assert_close(losses(lines), losses(single), rtol=2e-3, atol=0)
    norms = [torch.tensor([line["grad_norm"] for line in run]) for run in (lines, single)]
    torch.testing.assert_close(*norms, rtol=2e-2, atol=0)

"""Learning rate and weight decay: transformers' schedules, Megatron's formulas, and by hand.

Half a cosine from 3 to 1 over 4 steps is 3, 2 + cos 45°, 2, 2 - cos 45°.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from llmpipe.errors import UserError
from llmpipe.recipe import BatchRamp, Recipe, Schedule, WeightDecayRamp
from llmpipe.train.schedule import learning_rate, weight_decay

COS_45 = math.sqrt(0.5)
RECIPE = Recipe(seq_len=8, global_batch=1, steps=6, lr=3.0, schedule=Schedule(warmup=2, min_lr=1.0))
LONG = replace(RECIPE, steps=40, lr=2e-4, schedule=Schedule())
RAMP = BatchRamp(start=2, increment=2, samples=12)
"""To 6: steps of 2, 2, 2, 4, 4, 6, 6, … samples."""


def rates(recipe: Recipe) -> list[float]:
    return [learning_rate(recipe, step) for step in range(recipe.steps)]


def test_warmup_then_cosine() -> None:
    assert rates(RECIPE) == pytest.approx([1.5, 3, 3, 2 + COS_45, 2, 2 - COS_45])


@pytest.mark.parametrize("same", [{"warmup": 1 / 3}, {"warmup_samples": 16}], ids=["fraction", "samples"])
def test_warmup_in_other_units(same: dict[str, Any]) -> None:
    recipe = replace(RECIPE, global_batch=8)
    assert rates(replace(recipe, schedule=Schedule(min_lr=1.0, **same))) == pytest.approx(rates(recipe))


def test_constant_after_warmup() -> None:
    assert rates(replace(RECIPE, schedule=Schedule(kind="constant", warmup=2))) == pytest.approx([1.5, 3, 3, 3, 3, 3])


def test_cosine_without_warmup_ends_above_zero() -> None:
    assert rates(replace(RECIPE, steps=4, schedule=Schedule())) == pytest.approx(
        [3, 1.5 * (1 + COS_45), 1.5, 1.5 * (1 - COS_45)]
    )


Theirs = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LambdaLR]
WSD = {"num_warmup_steps": 5, "num_decay_steps": 12, "num_training_steps": 40, "min_lr_ratio": 0.1}
TRANSFORMERS: dict[str, tuple[Schedule, Theirs]] = {
    "cosine": (
        Schedule(warmup=5),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, 5, 40),
    ),
    "cosine to min_lr": (
        Schedule(warmup=5, min_lr=2e-5),
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 5, 40, min_lr=2e-5),
    ),
    "linear": (
        Schedule(kind="linear", warmup=0.125),
        lambda o: transformers.get_linear_schedule_with_warmup(o, 5, 40),
    ),
    "inverse-sqrt": (
        Schedule(kind="inverse-sqrt", warmup=5),
        lambda o: transformers.get_inverse_sqrt_schedule(o, 5),
    ),
    "constant": (
        Schedule(kind="constant", warmup=5),
        lambda o: transformers.get_constant_schedule_with_warmup(o, 5),
    ),
    "wsd, 1-sqrt": (
        Schedule(kind="wsd", warmup=5, decay=12, min_lr=2e-5),
        lambda o: transformers.get_wsd_schedule(o, decay_type="1-sqrt", **WSD),
    ),
    "wsd, linear": (
        Schedule(kind="wsd", warmup=5, decay=0.3, decay_shape="linear", min_lr=2e-5),
        lambda o: transformers.get_wsd_schedule(o, decay_type="linear", **WSD),
    ),
    "wsd, cosine": (
        Schedule(kind="wsd", warmup=5, decay=0.3, decay_shape="cosine", min_lr=2e-5),
        lambda o: transformers.get_wsd_schedule(o, decay_type="cosine", **WSD),
    ),
}


@pytest.mark.parametrize(("schedule", "theirs"), TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def test_as_transformers(schedule: Schedule, theirs: Theirs) -> None:
    """Theirs warms up from 0 in the first step, ours comes one step earlier to its end; from there on all is alike.

    Their wsd warms up from min_lr.
    """
    factor = theirs(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)).lr_lambdas[0]
    assert not isinstance(factor, torch.optim.lr_scheduler.LRScheduler)
    expected = [2e-4 * factor(step + 1 if step < 5 else step) for step in range(40)]
    first = 5 if schedule.kind == "wsd" else 0
    assert rates(replace(LONG, schedule=schedule))[first:] == pytest.approx(expected[first:], rel=1e-12)


def test_megatrons_exponential_decay() -> None:
    """2 · 0.5^share - 1 at shares of 0, 1/4, 1/2, 3/4 of the last four steps."""
    wsd = Schedule(kind="wsd", warmup=1, decay=4, decay_shape="exponential", min_lr=1.0)
    left = [1.0, 0.681792830507429, 0.414213562373095, 0.189207115002721]
    assert rates(replace(RECIPE, schedule=wsd)) == pytest.approx([3, 3, *(1 + 2 * part for part in left)])


def test_inverse_sqrt_stays_above_min_lr() -> None:
    schedule = Schedule(kind="inverse-sqrt", warmup=1, min_lr=1.6)
    assert rates(replace(RECIPE, schedule=schedule)) == pytest.approx([3, 3, 3 * COS_45, 3**0.5, 1.6, 1.6])


def test_growing_batches_count_by_samples() -> None:
    """26 samples; a warmup of 3 steps takes 6, what is left falls linearly over 20 of them: at 0, 4, 8, 14."""
    recipe = replace(RECIPE, steps=7, global_batch=6, batch_ramp=RAMP, schedule=Schedule(kind="linear", warmup=3))
    assert rates(recipe) == pytest.approx([1, 2, 3, 3, 3 * 16 / 20, 3 * 12 / 20, 3 * 6 / 20])
    by_samples = replace(recipe, schedule=Schedule(kind="linear", warmup_samples=6))
    assert rates(by_samples) == pytest.approx(rates(recipe))
    by_share = replace(recipe, schedule=Schedule(kind="linear", warmup=6 / 26))
    assert rates(by_share) == pytest.approx(rates(recipe))
    wsd = replace(recipe, schedule=Schedule(kind="wsd", warmup=3, decay=2, decay_shape="linear"))
    assert rates(wsd) == pytest.approx([1, 2, 3, 3, 3, 3, 3 / 2])


def test_weight_decay_as_megatrons_increment() -> None:
    """start + (end - start) · share, or · (cos(π · (1 - share)) + 1) / 2, by the share of samples before the step."""
    recipe = replace(RECIPE, steps=4, weight_decay=0.1)
    assert [weight_decay(recipe, step) for step in range(4)] == [0.1] * 4
    line = replace(recipe, weight_decay_ramp=WeightDecayRamp(end=0.5))
    assert [weight_decay(line, step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    cosine = replace(recipe, weight_decay_ramp=WeightDecayRamp(end=0.5, kind="cosine"))
    expected = [0.1 + 0.4 * share for share in (0, (1 - COS_45) / 2, 0.5, (1 + COS_45) / 2)]
    assert [weight_decay(cosine, step) for step in range(4)] == pytest.approx(expected)
    growing = replace(line, steps=7, global_batch=6, batch_ramp=RAMP)
    samples = [0, 2, 4, 6, 10, 14, 20]
    assert [weight_decay(growing, step) for step in range(7)] == pytest.approx([0.1 + 0.4 * n / 26 for n in samples])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"warmup": -1.0}, r"schedule\.warmup is -1\.0, but has to be 0 or more"),
        ({"warmup": 2, "warmup_samples": 8}, "schedule has warmup and warmup_samples: leave one out"),
        ({"kind": "inverse-sqrt"}, "inverse-sqrt falls from warmup's end on, as 1 / sqrt: give a warmup"),
        ({"kind": "wsd", "decay": 0.0}, r"schedule\.decay is 0\.0, but has to be above 0"),
        ({"kind": "wsd", "decay": 7}, r"schedule\.decay is 7, but there are only 6 steps"),
        ({"min_lr": 4.0}, r"schedule\.min_lr is 4\.0, but has to be from 0 to lr, 3\.0"),
    ],
)
def test_what_is_no_schedule(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(RECIPE, schedule=Schedule(**given))

"""The learning rate by hand: half a cosine from 3 to 1 over 4 steps is 3, 2 + cos 45°, 2, 2 - cos 45°."""

import math
from dataclasses import replace

import pytest

from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.schedule import learning_rate

COS_45 = math.sqrt(0.5)
RECIPE = Recipe(seq_len=8, global_batch=1, steps=6, lr=3.0, schedule=Schedule(warmup=2, min_lr=1.0))


def rates(recipe: Recipe) -> list[float]:
    return [learning_rate(recipe, step) for step in range(recipe.steps)]


def test_warmup_then_cosine() -> None:
    assert rates(RECIPE) == pytest.approx([1.5, 3, 3, 2 + COS_45, 2, 2 - COS_45])


def test_warmup_as_a_fraction_of_the_steps() -> None:
    assert rates(replace(RECIPE, schedule=Schedule(warmup=1 / 3, min_lr=1.0))) == rates(RECIPE)


def test_constant_after_warmup() -> None:
    assert rates(replace(RECIPE, schedule=Schedule(kind="constant", warmup=2))) == pytest.approx([1.5, 3, 3, 3, 3, 3])


def test_cosine_without_warmup_ends_above_zero() -> None:
    assert rates(replace(RECIPE, steps=4, schedule=Schedule())) == pytest.approx(
        [3, 1.5 * (1 + COS_45), 1.5, 1.5 * (1 - COS_45)]
    )

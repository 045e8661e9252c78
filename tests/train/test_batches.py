"""Which samples a step takes, by hand after Megatron's --rampup-batch-size.

Of n = (global - start) / increment increments, each samples / n samples long, as many have been made as fit into the
samples before the step.
"""

from dataclasses import replace

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe import BatchRamp, Recipe
from llmpipe.train.batches import Batches

RECIPE = Recipe(seq_len=8, global_batch=6, steps=7, lr=1.0)


def batches(global_batch: int, *ramp: int, steps: int = 7) -> Batches:
    start, increment, samples = ramp
    made = BatchRamp(start=start, increment=increment, samples=samples)
    return Batches(replace(RECIPE, global_batch=global_batch, batch_ramp=made, steps=steps))


def samples(made: Batches) -> list[range]:
    return [made.of_step(step) for step in range(made.steps)]


def test_all_steps_alike() -> None:
    made = Batches(replace(RECIPE, steps=3))
    assert samples(made) == [range(6), range(6, 12), range(12, 18)]
    assert made.total == 18 and made.sizes == [6]


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        ((6, 2, 2, 12), [2, 2, 2, 4, 4, 6, 6]),  # sizes change at 6 and at 12 samples
        ((6, 2, 4, 5), [2, 2, 2, 6, 6, 6, 6]),  # 5 samples are reached in the third step
        ((9, 1, 1, 4), [1, 3, 9, 9, 9, 9, 9]),  # 1 sample is two increments of half a sample each
        ((7, 1, 2, 10), [1, 1, 1, 1, 3, 5, 7]),  # at 10/3 and at 20/3 samples
        ((6, 6, 2, 100), [6] * 7),
    ],
)
def test_batches_grow_as_megatrons(given: tuple[int, ...], sizes: list[int]) -> None:
    found = samples(batches(*given))
    assert [len(step) for step in found] == sizes
    assert [step.start for step in found] == [sum(sizes[:i]) for i in range(7)]


def test_sizes_are_those_of_the_steps() -> None:
    assert batches(6, 2, 2, 12).sizes == [2, 4, 6]
    assert batches(6, 2, 2, 12, steps=5).sizes == [2, 4]
    assert batches(9, 1, 1, 4).sizes == [1, 3, 9]
    assert batches(6, 2, 2, 12, steps=5).total == 14
    assert [batches(6, 2, 2, 12).sizes_from(step) for step in (2, 3, 6)] == [[2, 4, 6], [4, 6], [6]]


@pytest.mark.parametrize(("start", "increment"), [(8, 2), (3, 2)])
def test_a_ramp_that_never_comes_to_the_global_batch(start: int, increment: int) -> None:
    with pytest.raises(UserError, match=f"batch_ramp goes from {start} up by 2 and never comes to global_batch 6"):
        batches(6, start, increment, 12)


def test_a_ramp_of_nothing() -> None:
    with pytest.raises(UserError, match=r"batch_ramp\.samples is 0, but has to be 1 or more"):
        BatchRamp(start=2, increment=2, samples=0)

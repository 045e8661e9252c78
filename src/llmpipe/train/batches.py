"""How many samples each step takes, and which: as many in every step, or more and more at the start.

A pure function of the recipe and the step: resume needs nothing but the step's number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llmpipe.recipe import BatchRamp, Recipe


@dataclass(frozen=True, slots=True)
class Phase:
    """A run of steps that take as many samples each."""

    first_step: int
    first_sample: int
    size: int


class Batches:
    """The samples of each step, counted from 0."""

    def __init__(self, recipe: Recipe):
        self.steps = recipe.steps
        self.phases = list(_phases(recipe.global_batch, recipe.batch_ramp))

    def before(self, step: int) -> int:
        """How many samples the steps before this one take."""
        phase = self._phase(step)
        return phase.first_sample + (step - phase.first_step) * phase.size

    def of_step(self, step: int) -> range:
        """The samples of a step."""
        first = self.before(step)
        return range(first, first + self._phase(step).size)

    @property
    def total(self) -> int:
        """The samples of all steps."""
        return self.before(self.steps)

    @property
    def sizes(self) -> list[int]:
        """How many samples a step may take, in the order in which that grows."""
        return self.sizes_from(0)

    def sizes_from(self, step: int) -> list[int]:
        """Those of this step and of the ones after it."""
        first = self._phase(step).first_step
        return [phase.size for phase in self.phases if first <= phase.first_step < self.steps]

    def _phase(self, step: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)


def _phases(global_batch: int, ramp: BatchRamp | None) -> Iterator[Phase]:
    """Of n sizes before the last, the i-th ends with the step that reaches i / n of the ramp's samples.

    A size whose share a step of the size before already took has no steps.
    """
    step = sample = 0
    sizes = range(ramp.start, global_batch, ramp.increment) if ramp else range(0)
    for i, size in enumerate(sizes, start=1):
        left = i * (ramp.samples if ramp else 0) - sample * len(sizes)  # of this size, in n-ths of a sample
        num_steps = max(0, -(-left // (size * len(sizes))))
        if num_steps:
            yield Phase(step, sample, size)
        step, sample = step + num_steps, sample + num_steps * size
    yield Phase(step, sample, global_batch)

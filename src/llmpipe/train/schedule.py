"""The learning rate and the weight decay of each step, by the samples that training has seen.

With all steps of one size that is by steps. Warmup counts the step's own samples too, so that no step is taken at rate
0; what follows counts those before it, as Megatron and transformers do.
"""

import math
from collections.abc import Callable

from llmpipe.recipe import Recipe
from llmpipe.train.batches import Batches

Course = Callable[[float], float]
"""Of a course from 1 to 0: what is left of it where a share of the way is done."""

COURSES: dict[str, Course] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov and Hutter 2017, arXiv:1608.03983
    "exponential": lambda done: 2 * 0.5**done - 1,  # Megatron's
    "1-sqrt": lambda done: 1 - math.sqrt(done),  # Hägele et al. 2024, arXiv:2405.18392
}


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step `step`, counted from 0."""
    schedule, batches = recipe.schedule, Batches(recipe)
    samples, total, warmup = batches.of_step(step), batches.total, warmup_samples(recipe, batches)
    if samples.start < warmup:
        return recipe.lr * min(1.0, samples.stop / warmup)
    if schedule.kind == "constant":
        return recipe.lr
    if schedule.kind == "inverse-sqrt":
        return max(schedule.min_lr, recipe.lr * math.sqrt(warmup / samples.start))
    start = warmup if schedule.kind != "wsd" else total - decay_samples(recipe, batches)
    left = COURSES[schedule.decay_shape if schedule.kind == "wsd" else schedule.kind]
    done = max(0.0, (samples.start - start) / (total - start))
    return schedule.min_lr + (recipe.lr - schedule.min_lr) * left(done)


def weight_decay(recipe: Recipe, step: int) -> float:
    """AdamW's decay in optimizer step `step`, counted from 0."""
    ramp, batches = recipe.weight_decay_ramp, Batches(recipe)
    if ramp is None:
        return recipe.weight_decay
    done = batches.before(step) / batches.total
    return ramp.end + (recipe.weight_decay - ramp.end) * COURSES[ramp.kind](done)


def warmup_samples(recipe: Recipe, batches: Batches) -> float:
    """How many samples the warmup takes."""
    return recipe.schedule.warmup_samples or _samples(recipe.schedule.warmup, batches, batches.before)


def decay_samples(recipe: Recipe, batches: Batches) -> float:
    """How many samples the decay at the end of wsd takes."""
    return _samples(recipe.schedule.decay, batches, lambda steps: batches.total - batches.before(batches.steps - steps))


def _samples(value: float, batches: Batches, of_steps: Callable[[int], int]) -> float:
    """A length in samples: below 1 it is a share of all samples, else a number of steps."""
    return value * batches.total if value < 1 else of_steps(round(value))

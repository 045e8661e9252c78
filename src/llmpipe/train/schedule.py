"""The learning rate of each step."""

import math

from llmpipe.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warmup from lr/warmup_steps, then the schedule's course."""
    schedule = recipe.schedule
    warmup_steps = warmup(schedule.warmup, recipe.steps)
    if step < warmup_steps:
        return recipe.lr * (step + 1) / warmup_steps
    if schedule.kind == "constant":
        return recipe.lr
    done = (step - warmup_steps) / max(1, recipe.steps - warmup_steps)
    return schedule.min_lr + (recipe.lr - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def warmup(value: float, steps: int) -> int:
    """Warmup in steps: a value below 1 is a fraction of all steps."""
    return round(value * steps) if value < 1 else round(value)

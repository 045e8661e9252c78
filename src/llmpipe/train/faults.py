"""Steps whose samples are passed over: a loss or gradient that is no number, or leaps; and when to go back.

A step keeps its number and its samples whether it is taken or skipped: the data's order depends on nothing that
happens. All ranks have the same loss and norm, summed over all of them, so they decide alike.
"""

import math
from collections import deque
from statistics import median
from typing import Any

from llmpipe.recipe import Recipe

NOT_FINITE, OVERFLOW, SPIKE, ASKED, ROLLED_BACK = "not finite", "overflow", "spike", "asked", "rolled back"
"""Why a step is skipped, as the metrics have it."""


class Watch:
    """Judges each step's loss and gradient norm; what it remembers stands in checkpoints."""

    def __init__(self, recipe: Recipe):
        self.rule, self.most = recipe.spike, recipe.roll_back_after
        self.taken: deque[list[float]] = deque(maxlen=self.rule.window)
        """Loss and norm of the last steps that were taken."""
        self.bad_steps, self.first_bad = 0, 0
        """How many were skipped in a row, and the first of them."""
        self.went_back = False
        """Since the last step that was taken."""

    def judge(self, step: int, loss: float, grad_norm: float, scale_can_shrink: bool = False) -> str | None:
        """Why the step is to be skipped; None to take it.

        fp16's overflows until its scale is found are no fault: of gradients, for no loss depends on the scale.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if math.isfinite(loss) and not finite and scale_can_shrink:
            return OVERFLOW
        if finite and not self._leaps(loss, grad_norm):
            self.taken.append([loss, grad_norm])
            self.bad_steps, self.went_back = 0, False
            return None
        self.first_bad = self.first_bad if self.bad_steps else step
        self.bad_steps += 1
        return SPIKE if finite else NOT_FINITE

    def _leaps(self, loss: float, grad_norm: float) -> bool:
        """Whether either is above its factor times the median of the steps before, once there are `window` of them."""
        if len(self.taken) < self.rule.window:
            return False
        losses, norms = zip(*self.taken, strict=True)
        return (0 < self.rule.factor * median(losses) < loss) or (0 < self.rule.norm_factor * median(norms) < grad_norm)

    @property
    def has_to_go_back(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves may be at fault."""
        return self.bad_steps >= self.most

    def goes_back(self) -> None:
        """The weights are a checkpoint's again."""
        self.bad_steps, self.went_back = 0, True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        bad = {"bad_steps": self.bad_steps, "first_bad": self.first_bad, "went_back": self.went_back}
        return {"taken": list(self.taken), **bad}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.taken = deque(state["taken"], maxlen=self.rule.window)
        self.bad_steps, self.first_bad, self.went_back = state["bad_steps"], state["first_bad"], state["went_back"]

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
        self.bad_steps = 0
        """How many were skipped in a row, but for overflows."""
        self.first_skipped = 0
        """The first one skipped, overflows too, since the last that was taken; 0: none is."""
        self.went_back = False
        """Since the last step that was taken."""

    def judge(self, step: int, loss: float, grad_norm: float, scale_can_shrink: bool = False) -> str | None:
        """Why the step is to be skipped; None to take it.

        fp16's overflows until its scale is found are no fault: of gradients, for no loss depends on the scale.
        """
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and not self._leaps(loss, grad_norm):
            self.taken.append([loss, grad_norm])
            self.bad_steps, self.first_skipped, self.went_back = 0, 0, False
            return None
        self.first_skipped = self.first_skipped or step
        if math.isfinite(loss) and not finite and scale_can_shrink:
            return OVERFLOW
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
        self.bad_steps, self.first_skipped, self.went_back = 0, 0, True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        bad = {"bad_steps": self.bad_steps, "first_skipped": self.first_skipped, "went_back": self.went_back}
        return {"taken": list(self.taken), **bad}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.taken = deque(state["taken"], maxlen=self.rule.window)
        self.bad_steps, self.went_back = state["bad_steps"], state["went_back"]
        older = state.get("first_bad", 0) if self.bad_steps else 0  # a checkpoint's from before overflows counted
        self.first_skipped = state.get("first_skipped", older)

"""fp16's dynamic loss scale: how Megatron's DynamicGradScaler moves it, alike on all ranks."""

from llmpipe.recipe import LossScale


class DynamicScale:
    """What the loss is multiplied by: 1 and still without a rule."""

    def __init__(self, rule: LossScale | None):
        self.rule, self.value = rule, rule.initial if rule else 1.0
        self.good_steps = 0
        self.overflows_left = rule.hysteresis if rule else 0

    @property
    def can_shrink(self) -> bool:
        """Whether a step that overflows may go better at a smaller scale."""
        return self.rule is not None and self.value > self.rule.min

    def update(self, finite: bool) -> None:
        """After each step whose loss is a number: are all ranks' gradients?

        `window` good steps in a row make the scale grow, and give back the `hysteresis` overflows that it bears before
        it shrinks; from then on each one shrinks it.
        """
        if self.rule is None:
            return
        if not finite:
            self.good_steps, self.overflows_left = 0, self.overflows_left - 1
            if self.overflows_left <= 0:
                self.value = max(self.value * self.rule.backoff, self.rule.min)
            return
        self.good_steps += 1
        if self.good_steps == self.rule.window:
            self.good_steps, self.overflows_left = 0, self.rule.hysteresis
            self.value *= self.rule.growth

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps, "overflows_left": self.overflows_left}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's."""
        self.value = state["value"]
        self.good_steps, self.overflows_left = int(state["good_steps"]), int(state["overflows_left"])

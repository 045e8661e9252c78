"""Axes: where their ticks stand, and numbers as short text."""

import math
from dataclasses import dataclass

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` along a line of `length` pixels."""

    low: float
    high: float
    length: float
    log: bool = False

    def at(self, value: float) -> float:
        """Pixels from the axis's start."""
        low, high, value = (map(math.log10, (self.low, self.high, value))) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low) * self.length

    @property
    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        return _powers(self.low, self.high) if self.log else _steps(self.low, self.high)


def make_axis(values: list[float], length: float, from_zero: bool = False, log: bool = False) -> Axis:
    """An axis that all these numbers fit on, from one round number to another."""
    low, high = min(values), max(values)
    if log and low > 0:
        return Axis(low / 1.05, high * 1.05, length, log=True)
    low = min(0.0, low) if from_zero else low
    if low == high:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if high else (0.0, 1.0)
    step = _step(low, high)
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, length)


def _step(low: float, high: float, most: int = 5) -> float:
    """1, 2 or 5 times a power of ten, so that at most so many steps lie between the two."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _steps(low: float, high: float) -> list[float]:
    step = _step(low, high)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten, and where there are few of them some numbers between them; over a short stretch, even steps."""
    if high < 6 * low:
        return _steps(low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5) if high > 10 * low else (1, 2, 3, 5)
    return [
        factor * 10.0**power
        for power in range(first, last + 1)
        for factor in factors
        if low <= factor * 10.0**power <= high
    ]


def labels(ticks: list[float]) -> list[str]:
    """The numbers of an axis, all in one form: 8e-4 and 1e-3, not 0.001."""
    largest, smallest = max(map(abs, ticks), default=0.0), min((abs(tick) for tick in ticks if tick), default=1.0)
    return [_power(tick) if tick and smallest < 1e-3 and largest < 0.1 else short(tick) for tick in ticks]


def short(value: float) -> str:
    """A number in at most four digits or so: 1.25M, 32k, 0.003, 2e-5."""
    for size, suffix in _SUFFIXES:
        if abs(value) >= size * 0.99995:
            return f"{value / size:.3g}{suffix}"
    return _power(value) if value and abs(value) < 1e-3 else f"{value:.4g}"


def _power(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"

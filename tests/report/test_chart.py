"""Axes, numbers as text, and curves where they belong."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from llmpipe.report.chart import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    bars,
    chart,
    running_median,
    thinned,
    unbroken,
)
from llmpipe.report.scale import labels, make_axis, short

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (5, "5"), (0.003, "0.003"), (2e-5, "2e-5"), (3.21e-4, "3.21e-4"), (6.931, "6.931"), (999, "999"),
        (1000, "1k"), (31_415, "31.4k"), (6_738_415_616, "6.74B"), (-1500, "-1.5k"), (999_960, "1M"),
    ],
)  # fmt: skip
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_the_numbers_of_an_axis_have_one_form() -> None:
    assert labels([0.0, 5e-4, 1e-3]) == ["0", "5e-4", "1e-3"]
    assert labels([0.0, 0.001, 0.002]) == ["0", "0.001", "0.002"]
    assert labels([1e-4, 0.1, 1.0]) == ["1e-4", "0.1", "1"]  # from end to end of a logarithmic one
    assert labels([]) == []


@pytest.mark.parametrize("values", [[0.1, 0.97], [3, 3], [0, 0], [-2, 5], [1e-9, 2e-9], [1, 1e6]])
def test_an_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    axis = make_axis(values, 100)
    assert axis.low <= min(values) and max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert axis.ticks[0] == pytest.approx(axis.low) and axis.ticks[-1] == pytest.approx(axis.high)
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == pytest.approx(100)


def test_a_logarithmic_axis() -> None:
    axis = make_axis([0.01, 100], 200, log=True)
    assert axis.at(1.0) == pytest.approx(100)  # the middle of four powers of ten
    assert axis.ticks == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert make_axis([1.8, 8.2], 200, log=True).ticks == pytest.approx([2, 4, 6, 8])
    assert make_axis([0.4, 3], 200, log=True).ticks == pytest.approx([0.5, 1, 2, 3])  # some in each half
    assert not make_axis([0.0, 1.0], 200, log=True).log  # there is no logarithm of 0


def test_a_curve_runs_from_corner_to_corner() -> None:
    drawn = parsed(chart([Curve("a", [(1, 0.0), (2, 5.0), (5, 10.0)], 2)], "A < B", "step"))
    (path,) = (path for path in drawn.iter(f"{SVG}path") if path.get("class") == "curve c2")
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    assert path.get("d") == f"M0.00 {height:.2f}L{width / 4:.2f} {height / 2:.2f}L{width:.2f} 0.00"
    assert drawn.get("aria-label") == "A < B"


def test_a_gap_stays_a_gap_and_a_lonely_point_is_seen() -> None:
    points = [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)]
    assert [*unbroken(points)] == [[(1, 1.0)], [(3, 2.0), (4, 3.0)]]
    drawn = parsed(chart([Curve("a", points, 0)], "t", "step"))
    assert len([*drawn.iter(f"{SVG}circle")]) == 1
    (path,) = (path for path in drawn.iter(f"{SVG}path") if "curve" in (path.get("class") or ""))
    assert path.get("d", "").count("M") == 2


def test_no_spike_of_a_long_curve_is_lost() -> None:
    points = [(step, 100.0 if step == 12_345 else -7.0 if step == 777 else math.sin(step)) for step in range(50_000)]
    kept = thinned(points)
    assert len(kept) <= 602 and {(12_345, 100.0), (777, -7.0), points[0], points[-1]} <= {*kept}
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thinned([(x, None) for x in range(10_000)])[0] == (0, None)


def test_the_running_median_is_numpys_and_no_spike_moves_it() -> None:
    numbers = np.random.default_rng(0).normal(size=300)
    points: list[tuple[float, float | None]] = [(float(x), float(y)) for x, y in enumerate(numbers)]
    reaches = [min(3, at, 299 - at) for at in range(300)]  # a fiftieth of them: three on either side
    windows = [float(np.median(numbers[at - reach : at + reach + 1])) for at, reach in enumerate(reaches)]
    assert [y for _, y in running_median(points)] == pytest.approx(windows)
    assert max(y or 0 for _, y in running_median([*points[:150], (149.5, 1e9), *points[150:]])) < 10
    assert [len(running_median(points, places=7)), running_median(points, places=7)[-1]] == [8, points[-1]]


def test_long_curves_have_their_median_over_them() -> None:
    drawn = parsed(chart([Curve("a", [(float(x), x % 7.0) for x in range(1000)], 0)], "t", "step"))
    assert [path.get("class") for path in drawn.iter(f"{SVG}path")][-3:-1] == ["raw curve c0", "median curve c0"]


def test_bars_are_as_tall_as_their_counts() -> None:
    drawn = parsed(bars([(1, 1, 5), (2, 3, 0), (4, 7, 10)], "lengths"))
    heights = [float(bar.get("height", "")) for bar in drawn.iter(f"{SVG}rect")]
    assert heights[0] == pytest.approx(heights[2] / 2) and heights[1] == 0

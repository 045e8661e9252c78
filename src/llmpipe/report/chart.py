"""One chart as SVG, in the page's own colours and fonts; a curve of any length becomes a few hundred points."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from statistics import median

from llmpipe.report.scale import Axis, labels, make_axis, short

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 16, 34
"""Room for the axes' numbers."""
BUCKETS = 300
MOST_DOTS = 40
SMOOTH_FROM = 200
"""Points from which on a curve is drawn faintly, and its running median over it: one step's number is noise."""
Point = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    label: str
    points: list[Point]
    """x in rising order; y is None where there is no number, and the line has a gap."""
    color: int
    """The number of one of the page's colours."""
    dashed: bool = False

    @property
    def numbers(self) -> list[float]:
        return [y for _, y in self.points if y is not None]


def chart(curves: list[Curve], title: str, x_label: str, from_zero: bool = False, log: bool = False) -> str:
    """The curves over each other; each has a number at least."""
    x_axis = _x_axis([x for curve in curves for x, _ in curve.points])
    y_axis = make_axis([y for curve in curves for y in curve.numbers], HEIGHT - TOP - BOTTOM, from_zero, log)
    drawn = [_grid(x_axis, y_axis, x_label), *(_curve(curve, x_axis, y_axis) for curve in curves)]
    drawn.append(f'<path class="hair"/><text class="readout" x="{x_axis.length:g}" y="2" text-anchor="end"/>')
    axes = {"x": asdict(x_axis), "y": asdict(y_axis), "width": x_axis.length, "height": y_axis.length, "left": LEFT}
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-x="{escape(x_label)}"'
        f' data-axes="{escape(json.dumps(axes))}"><g transform="translate({LEFT} {TOP})">{"".join(drawn)}</g></svg>'
    )


def _x_axis(values: list[float]) -> Axis:
    """From the first point to the last one, without room beyond."""
    low, high = min(values), max(values)
    return Axis(low, high, WIDTH - LEFT - RIGHT) if low < high else Axis(low - 1, high + 1, WIDTH - LEFT - RIGHT)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    width, height = x_axis.length, y_axis.length
    lines = [f'<path class="axis" d="M0 {height:g}H{width:g}"/>']
    for tick, label in zip(y_axis.ticks, labels(y_axis.ticks), strict=True):
        y = height - y_axis.at(tick)
        lines.append(f'<path class="grid" d="M0 {y:.1f}H{width:g}"/>')
        lines.append(f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks:
        lines.append(f'<text x="{x_axis.at(tick):.1f}" y="{height + 15:g}" text-anchor="middle">{short(tick)}</text>')
    lines.append(f'<text x="{width / 2:g}" y="{height + 30:g}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(lines)


def _curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    def places(points: list[Point]) -> list[list[str]]:
        return [
            [f"{x_axis.at(x):.2f} {y_axis.length - y_axis.at(y):.2f}" for x, y in run]
            for run in unbroken(thinned(points))
        ]

    runs, kind = places(curve.points), f"curve c{curve.color}" + (" dashed" if curve.dashed else "")
    drawn = [_path(runs, kind)]
    if len(curve.points) > SMOOTH_FROM:
        drawn = [_path(runs, f"raw {kind}"), _path(places(running_median(curve.points)), f"median {kind}")]
    sparse = curve.dashed and len(curve.numbers) <= MOST_DOTS
    for dot in (dot for run in runs for dot in run if sparse or len(run) == 1):
        x, y = dot.split()
        drawn.append(f'<circle class="dot c{curve.color}" cx="{x}" cy="{y}" r="2.5"/>')
    return "".join(drawn)


def _path(runs: list[list[str]], kind: str) -> str:
    line = "".join(f"M{'L'.join(run)}" for run in runs)
    return f'<path class="{kind}" d="{line}"/>'


def running_median(points: list[Point], places: int = BUCKETS) -> list[Point]:
    """At so many places of a curve the median of a fiftieth of its points around each: no spike moves it."""
    known = [(x, y) for x, y in points if y is not None]
    last, most = len(known) - 1, max(1, len(known) // 100)
    found: list[Point] = []
    for at in sorted({number * last // places for number in range(places + 1)}):
        reach = min(most, at, last - at)  # as far to either side
        found.append((known[at][0], median(y for _, y in known[at - reach : at + reach + 1])))
    return found


def thinned(points: list[Point], buckets: int = BUCKETS) -> list[Point]:
    """Of each of so many stretches of a long curve its lowest and its highest point, so that no spike is lost."""
    if len(points) <= 2 * buckets:
        return points
    kept: list[Point] = []
    for number in range(buckets):
        part = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        known = [(x, y) for x, y in part if y is not None]
        if not known:
            kept.append(part[0])
            continue
        kept += sorted({min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])})
    return [points[0], *(point for point in kept if points[0][0] < point[0] < points[-1][0]), points[-1]]


def unbroken(points: list[Point]) -> Iterator[list[tuple[float, float]]]:
    """The stretches between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def bars(ranges: list[tuple[int, int, int]], title: str) -> str:
    """How many documents are of which length; the ranges are one beside the other."""
    most, width, height = max(count for *_, count in ranges), WIDTH - 20, 110
    each = min(width / len(ranges), 44)
    drawn = []
    for number, (first, last, count) in enumerate(ranges):
        tall = count / most * (height - 18)
        x, y = number * each + 1, height - tall
        told = f"{first:,} to {last:,} tokens: {count:,} documents"
        drawn.append(
            f'<rect class="c0" x="{x:.1f}" y="{y:.1f}" width="{each - 2:.1f}" height="{tall:.1f}">'
            f"<title>{told}</title></rect>"
        )
        middle = x + each / 2 - 1
        if count:
            drawn.append(f'<text x="{middle:.1f}" y="{y - 4:.1f}" text-anchor="middle">{short(count)}</text>')
        drawn.append(f'<text x="{middle:.1f}" y="{height + 14}" text-anchor="middle">{_whole(first)}</text>')
    drawn.append(f'<text x="0" y="{height + 30}">tokens in a document, the first of each range</text>')
    return (
        f'<svg viewBox="-10 0 {WIDTH} {height + 36}" role="img" aria-label="{escape(title)}">'
        f'<path class="axis" d="M0 {height}H{width}"/>{"".join(drawn)}</svg>'
    )


def _whole(length: int) -> str:
    """A length below its bar: 512, 2k, 131k."""
    return str(length) if length < 1000 else f"{length / 1000:.0f}k" if length < 1_000_000 else f"{length / 1e6:.0f}M"

"""What each chart of a report shows: its curves, its unit, and what is measured, in plain words."""

from dataclasses import dataclass
from html import escape
from typing import Any

from llmpipe.report.chart import Curve, Point, chart
from llmpipe.report.gather import Run
from llmpipe.report.html import COLORS
from llmpipe.report.scale import short

GIB = 1 << 30
HELD_OUT = "eval_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A chart."""

    title: str
    unit: str
    told: str
    """What is measured and how to read it."""
    keys: dict[str, str]
    """Of metrics.jsonl: what their curves are called."""
    factor: float = 1.0
    """From the file's unit to this one."""
    from_zero: bool = False
    log: bool = False


QUANTITIES = (
    Quantity(
        title="Loss",
        unit="nats per token",
        told="Mean of -ln p(next token) over all trained tokens of a step, on a logarithmic scale. It should fall"
        " steeply, then slowly; exp(loss) is the perplexity.",
        keys={"loss": "training", "eval_loss": "held out"},
        log=True,
    ),
    Quantity(
        title="Accuracy",
        unit="%",
        told="How often the next token was the one that the model found likeliest.",
        keys={
            "accuracy": "training",
            "eval_accuracy": "held out",
            "assistant_accuracy": "the assistant's tokens",
        },
        factor=100,
        from_zero=True,
    ),
    Quantity(
        title="Learning rate", unit="per step", told="The optimizer's step size.", keys={"lr": "rate"}, from_zero=True
    ),
    Quantity(
        title="Gradient norm",
        unit="global L2 norm",
        told="Before clipping, on a logarithmic scale. A jump that does not come back is a sign of trouble.",
        keys={"grad_norm": "norm"},
        log=True,
    ),
    Quantity(
        title="Throughput",
        unit="tokens per second",
        told="Of all processes together. The first step is slow: buffers are made, kernels are compiled.",
        keys={"tokens_per_second": "throughput"},
        from_zero=True,
    ),
    Quantity(
        title="Use of the hardware (MFU)",
        unit="% of peak",
        told="The model's arithmetic per second over the devices' peak: a GPU's from its data sheet, a CPU's as"
        " measured with a matrix product. Full counts attention to all positions, causal only to those before.",
        keys={"mfu_full": "full", "mfu_causal": "causal"},
        factor=100,
        from_zero=True,
    ),
    Quantity(
        title="Memory",
        unit="GiB",
        told="The peak of the fullest process: of the GPU's allocator, or a CPU process's resident memory.",
        keys={"memory_bytes": "memory"},
        factor=1 / GIB,
        from_zero=True,
    ),
    Quantity(
        title="Loss scale",
        unit="factor",
        told="What the loss is multiplied by in fp16; halved where gradients overflow.",
        keys={"loss_scale": "scale"},
        log=True,
    ),
)


def charts(runs: list[Run]) -> list[str]:
    """A figure for each quantity of which there are numbers, all runs over each other."""
    by_tokens = len({tokens_per_step(run) for run in runs}) > 1
    drawn = [(quantity, curves(quantity, runs, by_tokens)) for quantity in QUANTITIES]
    return [
        figure(quantity, found, "tokens seen" if by_tokens else "step", len(runs) > 1)
        for quantity, found in drawn
        if found and not _is_constant(quantity, found)
    ]


def tokens_per_step(run: Run) -> float | None:
    """Of the first step that is recorded: runs with other batches are compared by tokens."""
    first = run.curves[0] if run.curves else {}
    return first.get("tokens", 0) / first["step"] if first else None


def curves(quantity: Quantity, runs: list[Run], by_tokens: bool) -> list[Curve]:
    """A curve for each run and each of its keys that has numbers; runs differ by colour, else keys do."""
    found = []
    for run_number, run in enumerate(runs):
        for key_number, (key, label) in enumerate(_keys(quantity, several=len(runs) > 1).items()):
            points = points_of(run.curves, key, "tokens" if by_tokens else "step", quantity.factor)
            if any(y is not None for _, y in points):
                several = len(runs) > 1
                of_several = f"{run.name}, {label}" if len(quantity.keys) > 1 else run.name
                name = of_several if several else label
                color = (run_number if several else key_number) % COLORS
                found.append(Curve(name, points, color, dashed=key.startswith(HELD_OUT)))
    return found


def _keys(quantity: Quantity, several: bool) -> dict[str, str]:
    """All of one run's curves; of several runs the first, and what is of held-out documents."""
    first = next(iter(quantity.keys))
    return {
        key: label for key, label in quantity.keys.items() if not several or key == first or key.startswith(HELD_OUT)
    }


def points_of(lines: list[dict[str, Any]], key: str, x_key: str, factor: float) -> list[Point]:
    """A quantity's points. What is of held-out documents is in some steps only, which are joined."""
    points = [(line[x_key], None if line.get(key) is None else line[key] * factor) for line in lines if x_key in line]
    return [point for point in points if point[1] is not None] if key.startswith(HELD_OUT) else points


def _is_constant(quantity: Quantity, found: list[Curve]) -> bool:
    """The loss scale of anything but fp16."""
    return quantity.title == "Loss scale" and all({*curve.numbers} == {1.0} for curve in found)


def figure(quantity: Quantity, found: list[Curve], x_label: str, several: bool) -> str:
    """A chart with its title, its curves' names and last numbers, and what it means."""
    svg = chart(found, quantity.title, x_label, quantity.from_zero, quantity.log)
    names = "".join(_name(curve, with_label=several or len(found) > 1) for curve in found)
    return (
        f'<figure><h3>{quantity.title} <span class="unit">{quantity.unit}</span></h3>{svg}'
        f'<ul class="names">{names}</ul><figcaption>{quantity.told}</figcaption></figure>'
    )


def _name(curve: Curve, with_label: bool) -> str:
    """A curve's name beside its colour, its last number, and the lowest and the highest."""
    low, high, last = min(curve.numbers), max(curve.numbers), curve.numbers[-1]
    label = f"{escape(curve.label)}: " if with_label else ""
    mark = f'<i class="c{curve.color}{" dashed" if curve.dashed else ""}"></i>'
    course = f"{short(last)} at the end, {short(low)} to {short(high)}" if low < high else f"{short(last)} throughout"
    return f"<li>{mark}{label}{course}</li>"

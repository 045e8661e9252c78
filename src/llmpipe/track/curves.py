"""Files of numbers, a JSON object a line, as the points of MLflow's charts.

A chart's name says its section, what it shows, and the unit where there is one: `speed/tokens_per_second`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.track.reading import reading

CHARTS = {
    "loss": "loss/train",
    "eval_loss": "loss/held_out",
    "lr": "optimizer/learning_rate",
    "grad_norm": "optimizer/gradient_norm",
    "loss_scale": "optimizer/loss_scale",
    "skipped_steps": "optimizer/skipped_steps",
    "tokens": "progress/tokens",
    "epoch": "progress/epochs",
    "perplexity": "quality/perplexity",
    "accuracy": "quality/accuracy",
    "assistant_accuracy": "quality/assistant_accuracy",
    "eval_perplexity": "quality/held_out_perplexity",
    "eval_accuracy": "quality/held_out_accuracy",
    "seconds": "speed/seconds_per_step",
    "eval_seconds": "speed/held_out_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_gpu": "speed/gpu_tokens_per_second",
    "mfu_full": "speed/mfu_full",
    "mfu_causal": "speed/mfu_causal",
    "memory_bytes": "speed/peak_memory_gigabytes",
}
"""Keys of a step's line → charts, which MLflow sorts by name; docs/finetune.md says what the keys mean."""
NOT_SHOWN = {"loss_scale": 1, "skipped_steps": 0}
"""Values that say that there is nothing to see: without them a chart is not drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of a chart."""

    chart: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One file's charts."""

    path: Path
    done_tag: str
    """The tag of the MLflow run that says how many of the lines are there."""
    host: str = ""
    """The node that the file tells of; empty: it tells of the training's steps."""
    alone: bool = False
    """That node is the training's only one: its charts stand in MLflow's own section, as those of any other run."""
    growing: bool = True
    """Lines may be added, and the last one may be half written."""

    def points(self, number: int, line: dict[str, Any], start_ms: int) -> list[Point]:
        """A line's; `number` counts lines from 1, `start_ms` is for lines that tell no time."""
        time_ms = int(1000 * line["time"]) if "time" in line else start_ms
        return [
            Point(chart=self._chart(key), value=self._value(key, value), time_ms=time_ms, step=line.get("step", number))
            for key, value in line.items()
            if key not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
            if NOT_SHOWN.get(key) != value
        ]

    def _chart(self, key: str) -> str:
        if not self.host:
            return CHARTS.get(key, f"more/{key}")
        return f"system/{key}" if self.alone else f"system/{self.host}/{key}"

    def _value(self, key: str, value: float) -> float:
        return value / 1e9 if key == "memory_bytes" else value


class Lines:
    """Reads a file of lines that is being written: each call gives what is new, or all again when it was cut back."""

    def __init__(self, curves: Curves):
        self.path, self.growing = curves.path, curves.growing
        self.count, self.offset, self.last = 0, 0, b""

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, object) of each whole line."""
        if not self.path.is_file():
            return
        with reading(self.path), self.path.open("rb") as file:
            self._find_place(file)
            for line in file:
                if not line.endswith(b"\n") and self.growing:
                    break
                self.count, self.offset, self.last = self.count + 1, self.offset + len(line), line
                try:
                    yield self.count, json.loads(line)
                except ValueError as error:
                    if not self.growing:
                        raise UserError(
                            f"{self.path}, line {self.count} is damaged ({error}): run finetune again"
                        ) from error

    def _find_place(self, file: Any) -> None:
        """After the last line that was read, or at the start where another line stands there now."""
        file.seek(self.offset - len(self.last))
        if file.read(len(self.last)) != self.last:
            self.count, self.offset, self.last = 0, 0, b""
            file.seek(0)

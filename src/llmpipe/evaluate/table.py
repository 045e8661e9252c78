"""The evaluation table: before, after, their difference; as JSON, Markdown and HTML.

    {"subject": {"path", "digest"}, "reference": {"path", "digest"} | null, "llmpipe": version,
     "rows": [{"task", "metric", "before", "after", "difference", "percent", "stderr", "n"}]}

`percent` is 100 · (after − before) / |before|; `stderr` is of `after`, where lm-eval estimates it.
"""

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llmpipe
from llmpipe.files import write_json, write_text

COLUMNS = ("task", "metric", "before", "after", "difference", "percent", "stderr", "n")
CAPTION = (
    "before is the reference, after is the model; percent is 100 * (after - before) / |before|; stderr is the standard"
    " error of after; n counts documents"
)


@dataclass(frozen=True, slots=True)
class Measure:
    """What one model got in one metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; without a reference, `before` and what follows from it are None."""

    task: str
    metric: str
    before: float | None
    after: float
    difference: float | None
    percent: float | None
    stderr: float | None
    n: int


def rows(after: list[Measure], before: list[Measure] | None) -> list[Row]:
    """Each measure beside the reference's."""
    found = {(measure.task, measure.metric): measure.value for measure in before or []}
    return [make_row(measure, found.get((measure.task, measure.metric))) for measure in after]


def make_row(measure: Measure, before: float | None) -> Row:
    difference = None if before is None else measure.value - before
    percent = 100 * difference / abs(before) if difference is not None and before else None
    return Row(measure.task, measure.metric, before, measure.value, difference, percent, measure.stderr, measure.n)


def write_table(directory: Path, subject: dict[str, Any], reference: dict[str, Any] | None, table: list[Row]) -> None:
    """table.md, table.html and table.json in a directory."""
    write_text(directory / "table.md", markdown(subject, reference, table))
    write_text(directory / "table.html", page(subject, reference, table))
    content = {
        "subject": subject,
        "reference": reference,
        "llmpipe": llmpipe.__version__,
        "rows": [asdict(row) for row in table],
    }
    write_json(directory / "table.json", content)


def cells(row: Row) -> list[str]:
    """A row as text."""
    return ["" if value is None else shown(name, value) for name, value in asdict(row).items()]


def shown(name: str, value: Any) -> str:
    if name in ("difference", "percent"):
        return f"{value:+.2f} %" if name == "percent" else f"{value:+.4g}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def heading(subject: dict[str, Any], reference: dict[str, Any] | None) -> str:
    return f"{subject['path']}" + (f", beside {reference['path']}" if reference else "")


def markdown(subject: dict[str, Any], reference: dict[str, Any] | None, table: list[Row]) -> str:
    """The table as a page of Markdown."""
    lines = [f"# Evaluation of {heading(subject, reference)}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in table]
    return "\n".join([*lines, "", f"{CAPTION}.", ""])


def page(subject: dict[str, Any], reference: dict[str, Any] | None, table: list[Row]) -> str:
    """The table as one self-contained page of HTML, for Snakemake's report."""
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(row)) + "</tr>" for row in table
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title><style>
body {{ font: 15px sans-serif; margin: 2em }}
table {{ border-collapse: collapse }}
th, td {{ border-bottom: 1px solid #ccc; padding: .4em .8em; text-align: right }}
th:nth-child(-n+2), td:nth-child(-n+2) {{ text-align: left }}
</style></head><body>
<h1>Evaluation of {html.escape(heading(subject, reference))}</h1>
<p>{html.escape(CAPTION)}.</p>
<table>
<tr>{head}</tr>
{body}
</table>
</body></html>
"""

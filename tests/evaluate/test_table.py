"""The table's arithmetic and its three forms."""

import json
from pathlib import Path

from llmpipe.evaluate.table import Measure, rows, write_table

AFTER = [Measure("piqa", "acc", 0.75, 0.05, 80), Measure("perplexity", "perplexity", 8.0, None, 3)]
BEFORE = [Measure("perplexity", "perplexity", 10.0, None, 3), Measure("piqa", "acc", 0.5, 0.06, 80)]


def test_rows_stand_beside_the_same_metric_of_the_reference() -> None:
    piqa, perplexity = rows(AFTER, BEFORE)
    assert (piqa.before, piqa.after, piqa.difference, piqa.percent, piqa.stderr, piqa.n) == (
        0.5,
        0.75,
        0.25,
        50.0,
        0.05,
        80,
    )
    assert (perplexity.difference, perplexity.percent, perplexity.stderr) == (-2.0, -20.0, None)


def test_without_a_reference_or_from_zero() -> None:
    assert [(row.before, row.difference, row.percent) for row in rows(AFTER, None)] == [(None, None, None)] * 2
    (row,) = rows([Measure("a", "acc", 0.5, None, 1)], [Measure("a", "acc", 0.0, None, 1)])
    assert (row.difference, row.percent) == (0.5, None)


def test_written_forms(tmp_path: Path) -> None:
    subject, reference = {"path": "runs/<a>/weights", "digest": "d"}, {"path": "checkpoint", "digest": "e"}
    write_table(tmp_path, subject, reference, rows(AFTER, BEFORE))
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["subject"] == subject and content["reference"] == reference
    assert content["rows"][0] == {
        "task": "piqa", "metric": "acc", "before": 0.5, "after": 0.75, "difference": 0.25, "percent": 50.0,
        "stderr": 0.05, "n": 80,
    }  # fmt: skip
    text = (tmp_path / "table.md").read_text()
    assert "| piqa | acc | 0.5000 | 0.7500 | +0.25 | +50.00 % | 0.0500 | 80 |" in text
    assert "| perplexity | perplexity | 10.0000 | 8.0000 | -2 | -20.00 % |  | 3 |" in text
    page = (tmp_path / "table.html").read_text()
    assert "runs/&lt;a&gt;/weights" in page and "<td>-20.00 %</td>" in page and "http" not in page

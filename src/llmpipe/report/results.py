"""What came out of runs, as HTML: key figures, curves, the evaluation; and what was set."""

from pathlib import Path
from typing import Any

from llmpipe.report.curves import charts
from llmpipe.report.figures import Figure, figures
from llmpipe.report.gather import Run
from llmpipe.report.html import COLORS, folded, note, run_name, table, text
from llmpipe.track.subject import flat

BLENDS = ("data", "validation", "test")
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "loss")
HIGHER_IS_BETTER = ("acc", "acc_norm", "exact_match", "f1", "bleu", "rouge1", "rouge2", "rougeL", "pass@1")


def numbers(runs: list[Run]) -> str:
    """The key figures: tiles of one run, a table of several, side by side."""
    found = [{figure.name: figure for figure in figures(run)} for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f"<li><h3>{figure.name}</h3><b>{text(figure.value)}</b><small>{text(figure.told)}</small></li>"
            for figure in found[0].values()
        )
        return f'<ul class="tiles">{tiles}</ul>'
    names = dict.fromkeys(name for one in found for name in one)
    rows = [[name, *(_cell(one.get(name)) for one in found)] for name in names]
    return table(["", *(run_name(number, run.name) for number, run in enumerate(runs))], rows, "facts")


def _cell(figure: Figure | None) -> str:
    return f"<b>{text(figure.value)}</b><small>{text(figure.told)}</small>" if figure else "<small>not recorded</small>"


def curves(runs: list[Run]) -> str:
    """The charts, and in words what there is none of."""
    drawn = charts(runs)
    without = [run.name for run in runs if not run.curves]
    told = [f"{text(name)} has no steps to draw yet." for name in without]
    if any(not any(line.get("eval_loss") is not None for line in run.curves) for run in runs if run.curves):
        told.append("Held-out loss is measured during training where a recipe says <code>eval_every</code>.")
    if len(runs) > COLORS:
        told.append(f"Colours come again after {COLORS} runs: compare fewer to tell them apart.")
    return f'<div class="charts">{"".join(drawn)}</div>' + "".join(map(note, told))


def settings(runs: list[Run]) -> str:
    """All that was set; of several runs what differs."""
    found = [_settings(run) for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    if len(runs) == 1:
        return folded(
            f"{len(keys)} settings", table(["key", "value"], [[text(key), text(found[0][key])] for key in keys])
        )
    different = [key for key in keys if len({one.get(key) for one in found}) > 1]
    if not different:
        return note("Model, data, recipe, layout and split are the same.")
    rows = [[text(key), *(text(one.get(key, "not set")) for one in found)] for key in different]
    names = [run_name(number, run.name) for number, run in enumerate(runs)]
    return table(["key", *names], rows, "compared") + note(
        f"The other {len(keys) - len(different)} settings are the same."
    )


def _settings(run: Run) -> dict[str, str]:
    record = run.record
    data = {
        key: {Path(part["prefix"]).name: part.get("weight", 1.0) for part in record.get(key) or []} for key in BLENDS
    }
    told = {key: record.get(key) for key in ("recipe", "layout", "split")}
    return flat({"model": record["model"]["path"]} | data | told)


def evaluation(runs: list[Run]) -> str:
    """Each metric before and after; of several runs side by side, and the last beside the first."""
    evaluated = [(number, run) for number, run in enumerate(runs) if run.table]
    missing = [note(f"{text(run.name)} has not been evaluated.") for run in runs if not run.table]
    if not evaluated:
        return "".join(missing)
    shown = _before_after(evaluated[0][1]) if len(evaluated) == 1 else _side_by_side(evaluated)
    return shown + "".join(missing)


def _before_after(run: Run) -> str:
    rows = [
        [
            text(row["task"]),
            text(row["metric"]),
            _score(row.get("before")),
            _score(row["after"], row.get("stderr")),
            _delta(row["metric"], row.get("difference"), row.get("percent")),
            f"{row['n']:,}",
        ]
        for row in (run.table or {"rows": []})["rows"]
    ]
    return table(["task", "metric", "before", "after", "difference", "documents"], rows, "scores")


def _side_by_side(runs: list[tuple[int, Run]]) -> str:
    """Runs, each with its number among all."""
    tables = [{(row["task"], row["metric"]): row for row in (run.table or {"rows": []})["rows"]} for _, run in runs]
    rows = []
    for task, metric in dict.fromkeys(key for one in tables for key in one):
        found = [one.get((task, metric)) for one in tables]
        cells = [_after(row) for row in found]
        first, last = found[0], found[-1]
        difference = last["after"] - first["after"] if first and last else None
        percent = (
            100 * difference / abs(first["after"]) if difference is not None and first and first["after"] else None
        )
        rows.append([text(task), text(metric), *cells, _delta(metric, difference, percent)])
    names = [run_name(number, run.name) for number, run in runs]
    return table(["task", "metric", *names, f"{names[-1]} less {names[0]}"], rows, "scores")


def _after(row: dict[str, Any] | None) -> str:
    """One run's cell beside another's."""
    if row is None:
        return "<small>not measured</small>"
    return (
        f"{_score(row['after'], row.get('stderr'))}<small>before {_score(row.get('before')) or 'not measured'}</small>"
    )


def _score(value: float | None, stderr: float | None = None) -> str:
    return "" if value is None else f"{value:.4f}" + (f" ± {stderr:.4f}" if stderr else "")


def _delta(metric: str, difference: float | None, percent: float | None) -> str:
    """A difference, coloured where it is known which way is better."""
    if not difference:
        return "" if difference is None else "0"
    better = (metric in HIGHER_IS_BETTER) - (metric in LOWER_IS_BETTER)
    kind = ("better" if difference * better > 0 else "worse") if difference * better else ""
    word = f' <span class="{kind}">{kind}</span>' if kind else ""
    return f"{difference:+.4g}" + (f" ({percent:+.1f} %)" if percent is not None else "") + word

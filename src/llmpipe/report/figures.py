"""The numbers that say how a run went, each with its unit and what it means; and the run as one sentence."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from llmpipe.families import FAMILIES, Shape
from llmpipe.report.curves import GIB
from llmpipe.report.gather import Run
from llmpipe.report.scale import short

LAST = 10  # steps whose mean is the loss at the end: one step's is noise


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a run."""

    name: str
    value: str
    told: str = ""
    """What it is, and the numbers beside it."""


def figures(run: Run) -> list[Figure]:
    """What there is to say; what was not recorded is left out."""
    found = [_state(run), _loss(run), _held_out(run), _perplexity(run), _time(run), _throughput(run), _mfu(run)]
    return [figure for figure in [*found, _memory(run), _tokens(run), _skipped(run)] if figure]


def _state(run: Run) -> Figure:
    steps, done = run.record["recipe"]["steps"], run.curves[-1]["step"] if run.curves else 0
    again = f"resumed from a checkpoint {times(run.resumed)}" if run.resumed else "in one go"
    if run.finished:
        return Figure("State", "finished", f"{steps:,} steps, {again}")
    return Figure("State", "not finished", f"{done:,} of {steps:,} steps so far; run finetune again and it goes on")


def _loss(run: Run) -> Figure | None:
    known = [line["loss"] for line in run.curves if line.get("loss") is not None]
    if not known:
        return None
    end = mean(known[-LAST:])
    told = f"nats per token, mean of the last {min(LAST, len(known))} steps; {known[0]:.3f} in the first"
    return Figure("Training loss", f"{end:.3f}", told)


def _held_out(run: Run) -> Figure | None:
    known = [(line["eval_loss"], line["step"]) for line in run.curves if line.get("eval_loss") is not None]
    if not known:
        return None
    lowest, step = min(known)
    told = f"nats per token, after step {known[-1][1]:,}; the lowest was {lowest:.3f} after step {step:,}"
    return Figure("Held-out loss", f"{known[-1][0]:.3f}", told)


def _perplexity(run: Run) -> Figure | None:
    row = row_of(run, "perplexity", "perplexity")
    if row is None:
        return None
    told = f"of {row['n']:,} held-out documents"
    if row.get("before") is None:
        return Figure("Test perplexity", f"{row['after']:.4g}", told)
    told += f", before {row['before']:.4g}" + (f" ({row['percent']:+.1f} %)" if row.get("percent") is not None else "")
    return Figure("Test perplexity", f"{row['after']:.4g}", told)


def _time(run: Run) -> Figure | None:
    seconds = run.record.get("seconds") or sum(line.get("seconds") or 0 for line in run.curves)
    each = [line["seconds"] for line in run.curves if line.get("seconds")]
    return Figure("Time", duration(seconds), f"a step takes {median(each):.3g} s (median)") if each else None


def _throughput(run: Run) -> Figure | None:
    rates = [line["tokens_per_second"] for line in run.curves if line.get("tokens_per_second")]
    if not rates:
        return None
    rate, processes = median(rates), num_processes(run)
    each = f"; {rate / processes:,.0f} for each of {processes}" if processes > 1 else ""
    return Figure("Throughput", f"{short(rate)} tokens/s", f"median of all steps{each}")


def _mfu(run: Run) -> Figure | None:
    found = {
        kind: [line[f"mfu_{kind}"] for line in run.curves if line.get(f"mfu_{kind}")] for kind in ("full", "causal")
    }
    if not found["full"]:
        return None
    told = "of the hardware's peak, median, attention counted in full"
    causal = f"; {median(found['causal']):.1%} counted causally" if found["causal"] else ""
    return Figure("MFU", f"{median(found['full']):.1%}", told + causal)


def _memory(run: Run) -> Figure | None:
    peaks = [line["memory_bytes"] for line in run.curves if line.get("memory_bytes")]
    kind = "a GPU's" if run.record["layout"].get("device") == "cuda" else "resident"
    return Figure("Peak memory", f"{max(peaks) / GIB:.3g} GiB", f"{kind}, of the fullest process") if peaks else None


def _tokens(run: Run) -> Figure | None:
    last = run.curves[-1] if run.curves else {}
    if not last.get("tokens"):
        return None
    epochs = f"{last['epoch']:.3g} epochs of the data" if last.get("epoch") is not None else ""
    return Figure("Tokens trained on", short(last["tokens"]), epochs)


def _skipped(run: Run) -> Figure | None:
    skipped = (run.curves[-1] if run.curves else {}).get("skipped_steps")
    reasons = sorted({line["skipped"] for line in run.curves if line.get("skipped")})
    return Figure("Skipped steps", f"{skipped:,}", "; ".join(reasons)) if skipped else None


def row_of(run: Run, task: str, metric: str) -> dict[str, Any] | None:
    """A row of the evaluation."""
    rows = run.table["rows"] if run.table else []
    return next((row for row in rows if (row["task"], row["metric"]) == (task, metric)), None)


def summary(run: Run) -> str:
    """The run in a sentence or two."""
    record, last = run.record, run.curves[-1] if run.curves else {}
    data = " and ".join(Path(part["prefix"]).name for part in record["data"])
    verb = "was trained" if run.finished else "is being trained, or was interrupted,"
    parts = [f"{model_name(run)}{_size(record)} {verb} for {last.get('step', 0):,} steps"]
    if last.get("tokens"):
        parts.append(f" ({short(last['tokens'])} tokens)")
    parts.append(f" on {data}, on {hardware(run)}.")
    row = row_of(run, "perplexity", "perplexity")
    if row and row.get("before") is not None:
        went = "fell" if row["after"] < row["before"] else "rose"
        parts.append(f" Perplexity of held-out text {went} from {row['before']:.4g} to {row['after']:.4g}.")
    return "".join(parts) + _proven(run)


def _proven(run: Run) -> str:
    """What was checked, and what has not been done."""
    passed = [card["verdict"] == "pass" for card in run.cards.values()]
    verified = " Its weights passed verification before training." if passed and all(passed) else ""
    done = {"verified": bool(passed), "evaluated": run.table is not None, "exported": run.check is not None}
    missing = [stage for stage, is_done in done.items() if not is_done]
    exported = " It is exported, and the export was read back and compared." if done["exported"] else ""
    return (
        verified + exported + (f" Not {' and not '.join(missing)} yet, as far as its folder shows." if missing else "")
    )


def model_name(run: Run) -> str:
    """The model's: the folder that its checkpoint and rank files lie in."""
    return Path(run.record["model"]["path"]).parent.name or Path(run.record["model"]["path"]).name


def _size(record: dict[str, Any]) -> str:
    parameters = num_parameters(record.get("shape"))
    return f" ({short(parameters)} parameters)" if parameters else ""


def num_parameters(shape: dict[str, Any] | None) -> int | None:
    """Of the whole model; None for a shape that another version of llmpipe wrote."""
    try:
        known = Shape(**(shape or {}))
        return sum(math.prod(row.shape(known)) for row in FAMILIES[known.family].keys(known).values())
    except (TypeError, KeyError):
        return None


def num_processes(run: Run) -> int:
    """Of all nodes: one a GPU."""
    layout = run.record["layout"]
    return layout.get("nodes", 1) * layout.get("gpus_per_node", 1)


def hardware(run: Run) -> str:
    """Processes and layout."""
    layout, count = run.record["layout"], num_processes(run)
    kind = "GPU" if layout.get("device") == "cuda" else "CPU process"
    several = "" if count == 1 else "es" if kind.endswith("s") else "s"
    split = " x ".join(f"{key} {layout[key]}" for key in ("tp", "pp", "cp", "dp") if layout.get(key, 1) > 1)
    return f"{count} {kind}{several}" + (f" ({split})" if split else "")


def duration(seconds: float) -> str:
    """Two units: 1 h 20 min, 3 min 5 s; below a minute one: 12.3 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    first = next(number for number, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])


def times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"

"""What a run's folder holds, as text for `llmpipe inspect`: a finished run, or one that is still training."""

from pathlib import Path
from typing import Any

from llmpipe.train.run_folder import is_finished, read_metrics, read_record


def describe(run: Path) -> str:
    """The run's model, data, recipe and layout, how far it is, and what it has published."""
    finished = is_finished(run)
    told = read_record(run, finished)
    rows = {"model": _model(told["model"]), "data": _data(told["data"]), "layout": _pairs(told["layout"])}
    rows |= {"recipe": _pairs(told["recipe"]), "split": ", ".join(f"{share:g}" for share in told["split"])}
    rows["state"] = f"{told['exit_reason']}, {told['seconds']} s" if finished else "not finished"
    rows |= _progress(read_metrics(run, finished), told["recipe"]["steps"])
    if finished:
        rows["weights"] = f"{told['weights_digest']} (llmpipe {told['llmpipe']}, torch {told['torch']})"
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/step-*/manifest.json"))
    rows["checkpoints"] = ", ".join(saved) or "none"
    return "\n".join([f"run {run}", *(f"  {name:<14}{value}" for name, value in rows.items())])


def _model(model: dict[str, Any]) -> str:
    return f"{model['path']}, of checkpoint {model['checkpoint_digest'] or 'not known'}"


def _data(data: list[dict[str, Any]]) -> str:
    return ", ".join(f"{part['prefix']} {part['weight']:g} ({(part['digest'] or 'not known')[:12]})" for part in data)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _progress(lines: list[dict[str, Any]], steps: int) -> dict[str, str]:
    """The last step's, and what the last evaluation found."""
    if not lines:
        return {"steps": f"0 of {steps}"}
    last = lines[-1]
    loss = "no loss" if last["loss"] is None else f"loss {last['loss']:.4f}"  # of a step that was passed over
    rate = f"{last['tokens_per_second']:,.0f} tokens/s"
    rows = {"steps": f"{last['step']} of {steps}, {last['tokens']:,} tokens, {loss}, {rate}"}
    if last.get("accuracy") is not None:
        rows["accuracy"] = f"{last['accuracy']:.1%} of the last step's trained tokens"
    rows |= {"skipped": f"{last['skipped_steps']} steps"} if last.get("skipped_steps") else {}
    evaluated = [line for line in lines if line.get("eval_loss") is not None]
    if evaluated:
        at = evaluated[-1]
        rows["held out"] = f"loss {at['eval_loss']:.4f}, perplexity {at['eval_perplexity']:.3f} after step {at['step']}"
    return rows

"""What an evaluation is asked for: options, and what a run's folder says of itself."""

from dataclasses import dataclass
from pathlib import Path

from llmpipe.config import PERPLEXITY
from llmpipe.errors import UserError
from llmpipe.train.record import run_record, weights_of

TASK_FILES = (".yaml", ".yml")
SPLIT = [969.0, 30.0, 1.0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which weights, which tasks, beside which reference."""

    weights: Path
    tasks: list[str]
    """perplexity, lm-eval's names, and files of lm-eval tasks."""
    data: list[str]
    """Dataset prefixes, for perplexity."""
    split: list[float]
    trained_on: list[str]
    """Datasets that were trained on whole, where `data` are others; none: the training documents of `data`."""
    reference: Path | None
    seq_len: int | None
    """Tokens that the models read at once; None: all they can."""

    @property
    def harness_tasks(self) -> list[str]:
        return [task for task in self.tasks if task != PERPLEXITY]

    @property
    def offline(self) -> bool:
        """Whether no task may be one whose data lm-eval would download."""
        return all(task.endswith(TASK_FILES) for task in self.harness_tasks)


def make_plan(
    path: Path,
    tasks: list[str],
    data: list[str] | None = None,
    split: list[float] | None = None,
    reference: Path | None = None,
    seq_len: int | None = None,
) -> Plan:
    """The plan for a run or a checkpoint: a run's data, split and sequence length are used where none are given."""
    run = run_record(path)
    if not tasks:
        raise UserError("--tasks names none: give perplexity, lm-eval task names or files of lm-eval tasks")
    trained_on, given = [part["prefix"] for part in run.get("data") or []], data or split
    test = [part["prefix"] for part in run.get("test") or []] if not given else []
    data, split = (test, [0.0, 0.0, 1.0]) if test else (data or trained_on, split)
    if PERPLEXITY in tasks and not data:
        raise UserError(
            f"the task perplexity needs held-out text, and {path} is no run that says which: give --data PREFIX"
        )
    for task in tasks:
        if task.endswith(TASK_FILES) and not Path(task).is_file():
            raise UserError(f"the task file {task} is missing: write it, or take it out of the tasks")
    return Plan(
        weights=weights_of(path),
        tasks=tasks,
        data=data,
        split=split or run.get("split") or SPLIT,
        trained_on=trained_on if test else [],
        reference=weights_of(reference) if reference else None,
        seq_len=seq_len or (run.get("recipe") or {}).get("seq_len"),
    )

"""llmpipe finetune: train, and be the launcher of the training."""

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmpipe import container
from llmpipe.cli import EXPERIMENT_VARIABLE, LOG_FILE, URI_VARIABLE, with_log

if TYPE_CHECKING:
    from llmpipe.launch import Place
    from llmpipe.layout import Layout
    from llmpipe.train.job import Job

_COUNT, _MINUTES, _POSITIVE = click.IntRange(min=0), click.FloatRange(min=0), click.FloatRange(min=0, min_open=True)
log = logging.getLogger(__name__)


@click.command("finetune")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Rank files, or a checkpoint.")
@click.option("--data", "data", multiple=True, required=True, metavar="PREFIX[=WEIGHT]", help="A dataset; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The run folder.")
@click.option("--split", default=None, show_default="969,30,1", help="Shares of train, validation, test.")
@click.option("--validation", multiple=True, metavar="PREFIX[=WEIGHT]", help="A dataset for validation; repeatable.")
@click.option("--test", multiple=True, metavar="PREFIX[=WEIGHT]", help="A dataset for perplexity; repeatable.")
@click.option("--tp", default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--pp", default=1, show_default=True, help="Pipeline stages.")
@click.option("--pp-layers", metavar="N,N,...", help="Layers of each stage, where the split is uneven: 15,17.")
@click.option("--vp", default=1, show_default=True, help="Virtual stages of each pipeline rank.")
@click.option(
    "--pp-schedule",
    type=click.Choice(["1f1b", "interleaved", "gpipe", "zero-bubble"]),
    default="1f1b",
    show_default=True,
    help="The order of the stages' passes.",
)
@click.option("--cp", default=1, show_default=True, help="Context-parallel ranks.")
@click.option("--dp", default=-1, show_default=True, help="Data-parallel ranks; -1: what is left over.")
@click.option(
    "--data-parallel",
    type=click.Choice(["full", "optimizer", "plain", "hybrid"]),
    default="full",
    show_default=True,
    help="What the dp x cp ranks share out: all; all but a step's weights; nothing; all inside each node.",
)
@click.option("--micro-batch", default=1, show_default=True, help="Sequences in one forward pass.")
@click.option("--nodes", default=1, show_default=True)
@click.option("--gpus-per-node", default=1, show_default=True, help="Processes on each node.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--config-file", "config_files", multiple=True, help="Recorded in run.json; repeatable.")
@click.option("--node-rank", default=0, envvar="SLURM_NODEID", help="Without a scheduler: which node this is.")
@click.option("--master", help="Without a scheduler: HOST:PORT of node 0.")
@click.option("--threads", type=int, help="CPU threads of this node for all its ranks; default: all it may use.")
@click.option(
    "--wait", default=600.0, show_default=True, help="Seconds to wait for another trainer of the run, node 0, GPUs."
)
@click.option("--exit-at-step", type=_COUNT, default=0, help="Save and leave after this step, exit status 75.")
@click.option("--exit-after-minutes", type=_MINUTES, default=0.0, help="Save and leave after these, exit status 75.")
@click.option(
    "--timeout-minutes", type=_POSITIVE, default=10.0, show_default=True, help="How long ranks wait for one that hangs."
)
@click.option(
    "--restarts", type=_COUNT, default=3, show_default=True, help="How often failed ranks are started again in place."
)
@click.option("--all-ranks", is_flag=True, help="Each rank writes the seconds and memory of its steps, in RUN/ranks.")
@click.option("--profile-steps", metavar="N[-N]", help="Trace these steps on each rank, in RUN/profile, for Perfetto.")
@click.option("--track-uri", envvar=URI_VARIABLE, help="MLflow's tracking store, where the training is then seen live.")
@click.option(
    "--track-experiment", default="llmpipe", show_default=True, envvar=EXPERIMENT_VARIABLE, help="MLflow's experiment."
)
@click.option("--dry-run", is_flag=True, help="Check everything, tell layout, memory and first batch, start nothing.")
@with_log
@click.pass_context
def command(ctx: click.Context, dry_run: bool, wait: float, **given: Any) -> None:
    """Train MODEL on datasets by a RECIPE, resuming by itself; starts its own processes.

    Exit status 0: trained and published in RUN (weights/, metrics.jsonl, run.json); 75: stopped as asked (Ctrl-C,
    SIGTERM, touch RUN/stop) after saving, run it again to go on; 1: failed.

    \b
    Example:
      llmpipe finetune config/recipes/tiny_llama.yaml --model results/models/tiny_llama/tp2-pp2 \\
          --data results/models/tiny_llama/corpora/tiny_llama --output scratch/run \\
          --tp 2 --pp 2 --gpus-per-node 4 --micro-batch 8 --device cpu
    """
    from llmpipe.launch import STOPPED, launch, takes_srun
    from llmpipe.train.supervise import interruptible

    # What they take out of `given` is needed again.
    if container.is_named() and (dry_run or not takes_srun(_layout({**given}), _place({**given}))):
        container.enter()
    try:
        with interruptible():
            job = _checked_job(dry_run, given)
            if dry_run:
                _tell(job)
                return
            ctx.exit(launch(job, _place(given), ctx.meta[LOG_FILE], wait))
    except KeyboardInterrupt:
        log.warning("stopped as asked, before there was anything to save")
        ctx.exit(STOPPED)


def _checked_job(dry_run: bool, given: dict[str, Any]) -> "Job":
    """What is to be trained; UserError for what cannot work."""
    from llmpipe.train.preflight import preflight
    from llmpipe.verify.card import require_card

    job = _job(**given)
    preflight(job, dry_run, elsewhere=container.is_named())
    require_card(Path(job.model))
    return job


def _tell(job: "Job") -> None:
    """Of a dry run."""
    from llmpipe.train.dry_run import told

    click.echo(told(job, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))


def _job(
    recipe: Path,
    model: Path,
    output: Path,
    data: tuple[str, ...],
    validation: tuple[str, ...],
    test: tuple[str, ...],
    split: str | None,
    profile_steps: str | None,
    config_files: tuple[str, ...],
    **given: Any,
) -> "Job":
    """What is to be trained; the other options have the names of the fields that they fill."""
    from llmpipe.config import parse_data
    from llmpipe.recipe import Recipe
    from llmpipe.train.job import Job, job_split, parse_steps
    from llmpipe.yaml_file import load

    return Job(
        recipe=load(Recipe, recipe),
        layout=_layout(given),
        model=str(model),
        data=parse_data(data),
        split=job_split(split, held_out=bool(validation or test)),
        validation=parse_data(validation, "--validation"),
        test=parse_data(test, "--test"),
        output=str(output),
        profile_steps=parse_steps(profile_steps),
        config_files=[str(recipe), *config_files],
        **_named(Job, given),
    )


def _layout(given: dict[str, Any]) -> "Layout":
    """How the processes share the work."""
    from llmpipe.layout import Layout, parse_layers

    pp_layers = [*parse_layers(given.pop("pp_layers"))]
    return Layout(pp_layers=pp_layers, **_named(Layout, given)).resolved()


def _place(given: dict[str, Any]) -> "Place":
    """Which node this is, and what of it the ranks may use."""
    from llmpipe.launch import Place

    threads = given.pop("threads") or len(os.sched_getaffinity(0))
    return Place(threads=threads, **_named(Place, given))


def _named(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """The options that have the names of a dataclass's fields."""
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}

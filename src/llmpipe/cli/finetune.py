"""llmpipe finetune: train, and be the launcher of the training."""

import os
import sys
from pathlib import Path

import click

from llmpipe.cli import LOG_FILE, with_log

_COUNT, _MINUTES, _POSITIVE = click.IntRange(min=0), click.FloatRange(min=0), click.FloatRange(min=0, min_open=True)


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
@click.option("--wait", default=600.0, show_default=True, help="Seconds to wait for another trainer of this run.")
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
@click.option("--dry-run", is_flag=True, help="Check everything, tell layout, memory and first batch, start nothing.")
@with_log
@click.pass_context
def command(
    ctx: click.Context,
    recipe: Path,
    model: Path,
    data: tuple[str, ...],
    output: Path,
    split: str | None,
    validation: tuple[str, ...],
    test: tuple[str, ...],
    pp_layers: str | None,
    config_files: tuple[str, ...],
    node_rank: int,
    master: str | None,
    threads: int | None,
    wait: float,
    exit_at_step: int,
    exit_after_minutes: float,
    timeout_minutes: float,
    restarts: int,
    all_ranks: bool,
    profile_steps: str | None,
    dry_run: bool,
    **layout: int | str,
) -> None:
    """Train MODEL on datasets by a RECIPE, resuming by itself; starts its own processes.

    Exit status 0: trained and published in RUN (weights/, metrics.jsonl, run.json); 75: stopped as asked (Ctrl-C,
    SIGTERM, touch RUN/stop) after saving, run it again to go on; 1: failed.

    \b
    Example:
      llmpipe finetune config/recipes/tiny_llama.yaml --model results/models/tiny_llama/tp2-pp2 \\
          --data results/models/tiny_llama/corpora/tiny_llama --output scratch/run \\
          --tp 2 --pp 2 --gpus-per-node 4 --micro-batch 8 --device cpu
    """
    from llmpipe.config import parse_data
    from llmpipe.launch import Place, launch
    from llmpipe.layout import Layout, parse_layers
    from llmpipe.recipe import Recipe
    from llmpipe.train.job import Job, job_split, parse_steps
    from llmpipe.train.preflight import preflight
    from llmpipe.verify.card import require_card
    from llmpipe.yaml_file import load

    job = Job(
        recipe=load(Recipe, recipe),
        layout=Layout(**layout, pp_layers=[*parse_layers(pp_layers)]).resolved(),  # type: ignore[arg-type]
        model=str(model),
        data=parse_data(data),
        split=job_split(split, held_out=bool(validation or test)),
        validation=parse_data(validation, "--validation"),
        test=parse_data(test, "--test"),
        output=str(output),
        exit_at_step=exit_at_step,
        timeout_minutes=timeout_minutes,
        all_ranks=all_ranks,
        profile_steps=parse_steps(profile_steps),
        config_files=[str(recipe), *config_files],
    )
    preflight(job)
    require_card(model)
    if dry_run:
        from llmpipe.train.dry_run import told

        click.echo(told(job, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
        return
    place = Place(
        node_rank=node_rank,
        master=master,
        threads=threads or len(os.sched_getaffinity(0)),
        restarts=restarts,
        exit_after_minutes=exit_after_minutes,
    )
    ctx.exit(launch(job, place, ctx.meta[LOG_FILE], wait))

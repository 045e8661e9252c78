"""llmpipe shard: a checkpoint, or rank files of another layout → rank files."""

from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline stages.")
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The rank files to make."
)
@click.option("--vp", type=click.IntRange(min=1), default=1, show_default=True, help="Virtual stages of a rank.")
@click.option("--pp-layers", metavar="N,N,...", help="Layers of each stage, where the split is uneven: 15,17.")
@click.option("--no-hash", is_flag=True, help="Take no SHA-256 of the weights: faster, and nothing can check them.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinite values instead of refusing them.")
@click.option("--dry-run", is_flag=True, help="Print every tensor's route, the disk and the time needed, and stop.")
@with_log
def command(
    source: Path,
    tp: int,
    pp: int,
    output: Path,
    vp: int,
    pp_layers: str | None,
    no_hash: bool,
    allow_nonfinite: bool,
    dry_run: bool,
) -> None:
    """Split a checkpoint, or rank files of another layout, into one file for each of tp x pp ranks.

    \b
    Example:
      llmpipe shard results/models/tiny_llama/checkpoint --tp 2 --pp 2 --output scratch/tp2-pp2
    """
    from llmpipe.checkpoint.convert import plan_shard, shard
    from llmpipe.layout import Stages, parse_layers

    stages = Stages(pp, vp, parse_layers(pp_layers))
    if dry_run:
        click.echo("\n".join(plan_shard(source, output, tp, stages)))
    else:
        shard(source, output, tp, stages, not no_hash, allow_nonfinite)

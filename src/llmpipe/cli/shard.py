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
@with_log
def command(source: Path, tp: int, pp: int, output: Path) -> None:
    """Split a checkpoint, or rank files of another layout, into one file for each of tp x pp ranks.

    \b
    Example:
      llmpipe shard results/models/tiny_llama/checkpoint --tp 2 --pp 2 --output scratch/tp2-pp2
    """
    from llmpipe.checkpoint.convert import shard

    shard(source, output, tp, pp)

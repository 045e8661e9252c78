"""llmpipe diff: two checkpoints of any formats, tensor by tensor."""

from pathlib import Path
from typing import Any

import click

from llmpipe.cli import with_log
from llmpipe.cli.sources import told, with_told


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--allow-dtype", is_flag=True, help="Tensors may differ in type, if rounding to the narrower makes them equal."
)
@click.option(
    "--atol", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Elements may differ by this."
)
@click.option("--weights-only", is_flag=True, help="Hyper-parameters may differ; they are shown.")
@click.option("--changed", is_flag=True, help="Show only the tensors that are not bit-equal.")
@with_told
@with_log
@click.pass_context
def command(
    ctx: click.Context, a: Path, b: Path, allow_dtype: bool, atol: float, weights_only: bool, changed: bool, **more: Any
) -> None:
    """Compare the tensors and hyper-parameters of two checkpoints, each of any format that convert reads.

    Both are read in llmpipe's own names and layout, so that Meta's, Hugging Face's and other files of the same model
    are equal. The table is on standard output. Exit status 1 if they differ.

    \b
    Example:
      llmpipe diff weights/tiny_llama results/models/tiny_llama/checkpoint
    """
    from llmpipe.checkpoint.diff import diff, summary, table

    found = diff(a, b, atol, told(**more))
    same = found.equal(allow_dtype, weights_only)
    click.echo(
        "\n".join([*table(found, changed), f"{summary(found)}; the same" if same else f"{summary(found)}; they differ"])
    )
    ctx.exit(0 if same else 1)

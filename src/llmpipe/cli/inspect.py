"""llmpipe inspect."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from llmpipe.cli import with_log
from llmpipe.cli.sources import told, with_told


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A dataset's, to show its text, if it has moved.")
@click.option("--mask", is_flag=True, help="Show a dataset's first chats, and what of them is trained.")
@click.option(
    "--documents", type=click.IntRange(min=1), default=3, show_default=True, help="How many of a dataset's to show."
)
@click.option("--tensors", is_flag=True, help="List every tensor of weights: type, sizes, our name.")
@with_told
@with_log
def command(path: Path, tokenizer: Path | None, mask: bool, documents: int, tensors: bool, **more: Any) -> None:
    """Show what a dataset, checkpoint, rank files, other weights, an adapter or a run hold, on standard output.

    PATH is a dataset's prefix (its files without .bin and .idx), a directory with a manifest.json, a run's folder, a
    LoRA adapter, or weights of any format that convert reads.

    \b
    Example:
      llmpipe inspect results/models/tiny_llama/checkpoint
    """
    from llmpipe.checkpoint import manifest
    from llmpipe.errors import UserError

    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if Path(f"{path}.idx").is_file():
        from llmpipe.data.describe import describe, first_documents

        click.echo(describe(path))
        if mask:
            from llmpipe.data.mask import masked_documents

            colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            click.echo("\n" + masked_documents(path, tokenizer, documents, colours))
        else:
            click.echo("\n" + first_documents(path, tokenizer, documents))
    elif manifest.has(path):
        from llmpipe.checkpoint.describe import describe

        click.echo(describe(path, tensors, told(**more)))
    elif (path / "run.json").is_file() or (path / "job.json").is_file():
        from llmpipe.train.describe import describe

        click.echo(describe(path))
    else:
        from llmpipe.checkpoint.describe import describe_adapter, describe_weights, holds_adapter, holds_weights

        if holds_weights(path):
            click.echo(describe_weights(path, tensors, told(**more)))
        elif holds_adapter(path):
            click.echo(describe_adapter(path))
        else:
            raise UserError(_nothing(path))


def _nothing(path: Path) -> str:
    from llmpipe.checkpoint import manifest

    inside = sorted(str(found.parent) for found in path.glob(f"*/{manifest.NAME}"))
    inside += sorted(str(found.with_suffix("")) for found in path.glob("*.idx"))
    hint = f"; inside it there are {', '.join(inside)}" if inside else ""
    return (
        f"{path} is not the prefix of a dataset, a run's folder, weights, an adapter, or a directory with a"
        f" {manifest.NAME}{hint}"
    )

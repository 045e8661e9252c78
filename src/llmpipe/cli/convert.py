"""llmpipe convert: any supported weights → a checkpoint."""

from pathlib import Path

import click

from llmpipe.cli import with_log

DTYPES = ("bf16", "fp16", "fp32")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The checkpoint to make."
)
@click.option("--to", type=click.Choice(["hf"]), default="hf", show_default=True, help="The format to write.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast every tensor; left out, each keeps its stored type.")
@click.option("--shape", help="A row of the size table, as llama2_7b, that the source has to agree with.")
@click.option("--dry-run", is_flag=True, help="Print what would be read and written, and stop.")
@with_log
def command(source: Path, output: Path, to: str, dtype: str | None, shape: str | None, dry_run: bool) -> None:
    """Convert weights in Meta's or Hugging Face's format, found out by itself, into a checkpoint.

    A checkpoint is a Hugging Face directory with a manifest.json: transformers opens it as it is.

    \b
    Example:
      llmpipe convert weights/tiny_llama --output scratch/checkpoint
    """
    from llmpipe.checkpoint import convert
    from llmpipe.families import named_size

    expected = named_size(shape) if shape else None
    cast = convert.DTYPES[dtype] if dtype else None
    if dry_run:
        click.echo("\n".join(convert.plan_convert(source, output, cast, expected)))
    else:
        convert.convert(source, output, cast, expected)

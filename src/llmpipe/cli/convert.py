"""llmpipe convert: any supported weights → a checkpoint, or another format."""

from pathlib import Path
from typing import Any

import click

from llmpipe.cli import with_log
from llmpipe.cli.sources import told, with_told
from llmpipe.cli.targets import target, with_target


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The directory to make."
)
@with_target
@click.option(
    "--adapter",
    type=click.Path(file_okay=False, path_type=Path),
    help="A LoRA adapter in PEFT's format (adapter_config.json), merged into the weights.",
)
@click.option(
    "--add-token", "tokens", multiple=True, metavar="TOKEN", help="Add a token to the vocabulary; again for more."
)
@click.option(
    "--new-rows",
    type=click.Choice(["mean", "zeros"]),
    default="mean",
    show_default=True,
    help="The embedding's and the head's rows of added tokens: the mean of the old rows, or zeros.",
)
@with_told
@click.option("--no-hash", is_flag=True, help="Take no SHA-256 of the weights: faster, and nothing can check them.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinite values instead of refusing them.")
@click.option("--dry-run", is_flag=True, help="Print every tensor's route, the disk and the time needed, and stop.")
@with_log
def command(
    source: Path,
    output: Path,
    adapter: Path | None,
    tokens: tuple[str, ...],
    new_rows: str,
    shape: str | None,
    source_dialect: str | None,
    vocab: int | None,
    no_hash: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    **written: Any,
) -> None:
    """Convert weights of any supported format, found out by itself, into a checkpoint or another format.

    SOURCE is a directory of Hugging Face's, Meta's, Megatron's (any fork, any TP x PP) or EasyLM's. A checkpoint is a
    Hugging Face directory with a manifest.json: transformers opens it as it is.

    \b
    Example:
      llmpipe convert weights/tiny_llama --output scratch/checkpoint
    """
    from llmpipe.checkpoint import convert
    from llmpipe.checkpoint.changes import Changes

    to, said = target(**written), told(shape, source_dialect, vocab)
    changes = Changes(adapter, tokens, new_rows)  # type: ignore[arg-type]
    if dry_run:
        click.echo("\n".join(convert.plan_convert(source, output, to, said, changes)))
    else:
        convert.convert(source, output, to, said, not no_hash, allow_nonfinite, changes)

"""llmpipe export."""

from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("model", metavar="RUN_OR_CHECKPOINT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The model's directory."
)
@click.option("--to", type=click.Choice(["hf"]), default="hf", show_default=True, help="The format.")
@with_log
def command(model: Path, output: Path, to: str) -> None:
    """Make a Hugging Face directory of a trained model, with a model card.

    Before it takes its name, transformers has to load it and give the same logits and the same greedy text as the
    trained model in its own processes; check.json has the numbers.

    \b
    Example:
      llmpipe export results/runs/tiny_llama --output scratch/export
    """
    from llmpipe.export.export import export

    export(model, output)

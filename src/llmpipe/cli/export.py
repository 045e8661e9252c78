"""llmpipe export: a trained model for the world, in any format, checked before it takes its name."""

from pathlib import Path
from typing import Any

import click

from llmpipe.cli import with_log
from llmpipe.cli.targets import target, with_target


@click.command()
@click.argument("model", metavar="RUN_OR_CHECKPOINT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The model's directory."
)
@with_target
@click.option(
    "--push-to-hub",
    "repository",
    metavar="ORG/NAME",
    help="Then upload it to this repository on the Hugging Face hub, a private one if it is new, with your own token.",
)
@with_log
def command(model: Path, output: Path, repository: str | None, **written: Any) -> None:
    """Write a trained model in a format that others read, with a model card that says how.

    Before it takes its name it is read back: its tensors are the run's bit for bit, and transformers, or a plain
    forward in the format's own convention, gives the same logits on it as llmpipe's decoder on the run's weights.
    check.json has the numbers.

    \b
    Example:
      llmpipe export results/runs/tiny_llama --output scratch/export
    """
    from llmpipe.export.export import export, export_and_push

    if repository:
        export_and_push(model, output, target(**written), repository)
    else:
        export(model, output, target(**written))

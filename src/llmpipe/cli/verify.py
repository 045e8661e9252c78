"""`llmpipe verify`: a checkpoint against its source, rank files against their checkpoint."""

from pathlib import Path

import click

from llmpipe.cli import with_log

DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("subject", metavar="CHECKPOINT_OR_RANK_FILES", type=DIRECTORY)
@click.option(
    "--reference", required=True, type=DIRECTORY, metavar="SOURCE", help="What it was made from, in its own format."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The card; .md and .html stand beside it. [default: verify.json beside the directory]",
)
@click.option("--adapter", type=DIRECTORY, help="Where the adapter that was merged lies now, if it was moved.")
@with_log
def command(subject: Path, reference: Path, output: Path | None, adapter: Path | None) -> None:
    """Compare a checkpoint with the weights it came from, or rank files with their checkpoint.

    Both sides run in fp32, the source through a forward in its own convention; bytes, logits, loss, hyper-parameters
    and tokenizer are compared and the findings are written as a card. Exit status 1 if any threshold is exceeded; the
    first layer that differs is named, and the card is CARD.failed.json.

    \b
    Example:
      llmpipe verify results/models/tiny_llama/checkpoint --reference weights/tiny_llama --output scratch/card.json
    """
    from llmpipe.errors import UserError
    from llmpipe.verify.gate import verify

    try:
        verify(subject, reference, output, adapter)
    except UserError:
        raise
    except Exception:
        _check_readable(subject, reference)
        raise


def _check_readable(*directories: Path) -> None:
    """UserError of convert's readers where files are damaged: verify's own, which share none of it, just fail."""
    from llmpipe.checkpoint.convert import check_floating
    from llmpipe.checkpoint.formats import open_source

    for directory in directories:
        check_floating(open_source(directory))

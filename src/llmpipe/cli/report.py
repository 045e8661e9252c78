"""llmpipe report."""

from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page.",
)
@with_log
def command(runs: tuple[Path, ...], output: Path) -> None:
    """Write one page of HTML on a run, or comparing several: open it in a browser, mail it.

    RUNS are run folders, finished or not. The page needs no network and nothing beside it: curves, evaluation,
    verification cards, statistics of the data, the chain of hashes from corpus and source weights to the export, the
    commands. Of several runs the curves lie over each other, and only the settings that differ are shown.

    \b
    Example:
      llmpipe report results/runs/tiny_llama results/runs/tiny_falcon --output scratch/report.html
    """
    from llmpipe.report.page import report

    report([*runs], output)

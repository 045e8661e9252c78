"""llmpipe track."""

from pathlib import Path

import click

from llmpipe.cli import EXPERIMENT_VARIABLE, URI_VARIABLE, with_log


@click.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--uri", default="sqlite:///mlflow.db", show_default=True, envvar=URI_VARIABLE, help="MLflow's tracking store."
)
@click.option(
    "--experiment", default="llmpipe", show_default=True, envvar=EXPERIMENT_VARIABLE, help="MLflow's experiment."
)
@click.option(
    "--follow", is_flag=True, help="Go on, and mirror what is added, until the run has ended or SIGTERM comes."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file that says what went where."
)
@with_log
def command(results: Path, uri: str, experiment: str, follow: bool, output: Path | None) -> None:
    """Mirror runs, finished or training, and models to MLflow.

    RESULTS is a run's folder, a model's folder, or a results folder with many of both. Tracking the same files again
    changes nothing. A sqlite store lies in the current folder, its artifacts beside it in mlruns/.

    \b
    Example:
      llmpipe track results/runs/tiny_llama
    """
    from llmpipe.track import mirror

    if follow:
        mirror.follow(results, uri, experiment)
    else:
        mirror.track(results, uri, experiment, output)

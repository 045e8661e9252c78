"""llmpipe evaluate."""

from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("model", metavar="RUN_OR_CHECKPOINT", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tasks", required=True, help="perplexity, lm-eval task names, lm-eval task files; joined by commas.")
@click.option("--data", multiple=True, metavar="PREFIX[=WEIGHT]", help="Datasets for perplexity; default: the run's.")
@click.option("--split", help="Shares of train, validation and test; default: the run's, else 969,30,1.")
@click.option("--reference", type=click.Path(exists=True, file_okay=False, path_type=Path), help="The model before.")
@click.option("--seq-len", type=int, help="Tokens read at once; default: the run's, else all that the model can.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A directory for the table.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--tp", default=1, show_default=True, help="Processes that share the model.")
@with_log
def command(
    model: Path, tasks: str, data: tuple[str, ...], split: str | None, reference: Path | None, seq_len: int | None,
    output: Path, device: str, tp: int,
) -> None:  # fmt: skip
    """Measure a trained model, beside a reference where one is given.

    Writes table.json, table.md and table.html: a row for each metric of each task. A run brings its own data, split
    and sequence length. perplexity is over the test split's documents.

    \b
    Example:
      llmpipe evaluate results/runs/tiny_llama --tasks perplexity \\
          --reference results/models/tiny_llama/checkpoint --output scratch/evaluate
    """
    from llmpipe.config import parse_data, parse_split
    from llmpipe.evaluate.plan import make_plan

    names = [task.strip() for task in tasks.split(",") if task.strip()]
    plan = make_plan(model, names, list(parse_data(data)), parse_split(split) if split else None, reference, seq_len)

    from llmpipe.evaluate.evaluate import run

    run(plan, output, device, tp)

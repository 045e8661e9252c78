"""llmpipe download: weights from the Hugging Face hub → a directory that convert takes."""

from pathlib import Path

import click

from llmpipe.cli import with_log

FORMATS = ("safetensors", "bin", "meta")


@click.command()
@click.argument("source", metavar="hf://ORG/NAME[@REV]")
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The directory to make."
)
@click.option(
    "--weights",
    type=click.Choice(FORMATS),
    help="Which weights, where a repository has several. [default: the first of these that it has]",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Further files, as 'adapter_*'; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched, and stop.")
@with_log
def command(source: str, output: Path, weights: str | None, include: tuple[str, ...], dry_run: bool) -> None:
    """Fetch the files of a model that its weights, tokenizer and licence are in, with your own token and cache.

    REV is a branch, a tag or a commit; which commit it was stands in the manifest.json, with the SHA-256 of every
    file. Each is compared with what the hub says of it. Killed and run again it fetches what is not there whole.

    \b
    Example:
      llmpipe download hf://meta-llama/Llama-2-7b-hf@main --output scratch/llama-2-7b
    """
    from llmpipe.checkpoint.download import download, plan

    if dry_run:
        click.echo("\n".join(plan(source, output, weights, include)))
    else:
        download(source, output, weights, include)

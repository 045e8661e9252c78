"""llmpipe merge: rank files → a checkpoint; datasets → one dataset."""

from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The checkpoint, or the dataset's prefix."
)
@click.option(
    "--remove-rejects", is_flag=True, help="Remove the datasets' .rejects.jsonl: the joined one has their lines."
)
@with_log
def command(sources: tuple[Path, ...], output: Path, remove_rejects: bool) -> None:
    """Merge rank files of any layout into a checkpoint, or datasets, given by their prefixes, into one.

    All parts of a corpus (tokenize --part) become what tokenizing it at once makes, in whatever order they are given.

    \b
    Example:
      llmpipe merge results/models/tiny_llama/tp2-pp2 --output scratch/merged
    """
    from llmpipe.errors import UserError

    prefixes = _prefixes(sources)
    if all(prefix.with_name(prefix.name + ".idx").is_file() for prefix in prefixes):
        from llmpipe.data.dataset.join import join

        join(prefixes, output, remove_rejects)
        return
    if len(sources) != 1:
        raise UserError(
            f"{', '.join(map(str, sources))} are not all datasets (PREFIX.bin, PREFIX.idx): merge takes one directory"
            " of rank files, or datasets"
        )
    from llmpipe.checkpoint.convert import merge

    merge(*sources, output)


def _prefixes(sources: tuple[Path, ...]) -> list[Path]:
    """The datasets of a shell's PREFIX.part-*.bin, which names their roles too: those go along."""
    found = [source.with_suffix("") if source.suffix in (".bin", ".idx") else source for source in sources]
    return [path for path in found if not (path.suffix == ".roles" and path.with_suffix("") in found)]

"""llmpipe tokenize"""

import os
from pathlib import Path

import click

from llmpipe.cli import with_log


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Directory with a tokenizer.model.")
@click.option(
    "--output", required=True, metavar="PREFIX", type=click.Path(path_type=Path), help="Writes PREFIX.bin, .idx."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads that encode.  [default: the CPUs of this process]")
@click.option("--text-key", metavar="K", help="Key of a JSONL line that holds the document.  [default: text]")
@click.option(
    "--bos/--no-bos", default=None, help="Start documents with BOS.  [default: the tokenizer's add_bos_token]"
)
@click.option("--append-eod/--no-append-eod", default=None, help="End documents with EOS.  [default: append]")
@with_log
def command(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    output: Path,
    workers: int | None,
    text_key: str | None,
    bos: bool | None,
    append_eod: bool | None,
) -> None:
    """Tokenize text into a dataset: PREFIX.bin, PREFIX.idx (Megatron's format) and PREFIX.manifest.json.

    INPUT is a .jsonl, .jsonl.gz or .txt file, a directory of them, or one corpora/*.yaml.

    \b
    Example:
      llmpipe tokenize data/tiny_llama.jsonl --tokenizer results/models/tiny_llama/checkpoint --output scratch/corpus
    """
    from llmpipe.data.tokenize import corpus_of, tokenize

    corpus = corpus_of(list(inputs), text_key=text_key, bos=bos, append_eod=append_eod)
    tokenize(corpus, tokenizer, output, workers or len(os.sched_getaffinity(0)))

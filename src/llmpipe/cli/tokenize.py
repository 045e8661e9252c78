"""llmpipe tokenize"""

import os
from pathlib import Path
from typing import Any

import click

from llmpipe.cli import with_log

MOST_WORKERS = 8
"""Without --workers: so many threads with their caches stay below half a gigabyte."""


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Directory with a tokenizer's files.")
@click.option(
    "--output", required=True, metavar="PREFIX", type=click.Path(path_type=Path), help="Writes PREFIX.bin, .idx."
)
@click.option(
    "--workers", type=click.IntRange(min=1), help="Threads or processes that encode.  [default: the CPUs, at most 8]"
)
@click.option(
    "--text-key", metavar="K", multiple=True, help="Key of a row's document; several are joined.  [default: text]"
)
@click.option("--chat", is_flag=True, help="Rows are chats: writes PREFIX.roles.bin, .idx, too.")
@click.option("--template", metavar="NAME", help="Of chats: chatml, llama2, …  [default: the tokenizer's own]")
@click.option("--max-length", type=click.IntRange(min=2), help="Of chats: longer ones are split at turns.")
@click.option("--tokens", is_flag=True, help="Rows are tokens already: input_ids, with or without labels.")
@click.option(
    "--bos/--no-bos", default=None, help="Start documents with BOS.  [default: the tokenizer's add_bos_token]"
)
@click.option("--append-eod/--no-append-eod", default=None, help="End documents with EOS.  [default: append]")
@click.option("--skip-bad", metavar="N", type=click.IntRange(min=0), help="Leave out up to N bad rows, and list them.")
@click.option(
    "--encoder",
    type=click.Choice(["auto", "reference"]),
    default="auto",
    show_default=True,
    help="Of texts: llmpipe's own where it knows the tokenizer, or always the tokenizer's library, which is slower.",
)
@click.option("--part", metavar="I/N", help="Tokenize the I-th of N parts, into PREFIX.part-I-of-N; merge joins them.")
@with_log
def command(
    inputs: tuple[Path, ...],
    tokenizer: Path,
    output: Path,
    workers: int | None,
    text_key: tuple[str, ...],
    chat: bool,
    tokens: bool,
    part: str | None,
    encoder: str,
    **options: Any,
) -> None:
    """Tokenize text into a dataset: PREFIX.bin, PREFIX.idx (Megatron's format) and PREFIX.manifest.json.

    INPUT is a .jsonl, .json, .txt (also .gz, .zst), .parquet or .arrow file, a directory of them, one that `datasets`
    saved, or one corpora/*.yaml. A killed run goes on where it was when it is started again.

    \b
    Example:
      llmpipe tokenize data/tiny_llama.jsonl --tokenizer results/models/tiny_llama/checkpoint --output scratch/corpus
    """
    from llmpipe.data.parts import Part
    from llmpipe.data.tokenize import corpus_of, tokenize
    from llmpipe.errors import UserError

    options["text_key"] = list(text_key) if len(text_key) > 1 else next(iter(text_key), None)
    if chat and tokens:
        raise UserError("--chat and --tokens do not go together: rows are chats, or tokens")
    options["kind"] = "chat" if chat else "tokens" if tokens else None
    corpus = corpus_of(list(inputs), **options)
    workers = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    tokenize(corpus, tokenizer, output, workers, Part.parse(part) if part else None, encoder == "auto")

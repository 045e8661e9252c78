"""llmpipe convert: any supported weights → a checkpoint, or another format."""

from pathlib import Path

import click

from llmpipe.cli import with_log

DTYPES = ("bf16", "fp16", "fp32")
DIALECTS = ("mcore", "legacy", "epf", "ali", "mfz")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The directory to make."
)
@click.option(
    "--to",
    type=click.Choice(["hf", "meta", "megatron", "easylm"]),
    default="hf",
    show_default=True,
    help="The format to write; hf is a checkpoint, which the other stages take.",
)
@click.option(
    "--dialect",
    type=click.Choice(DIALECTS),
    help="Of --to megatron: Megatron-LM's (mcore, legacy), Megatron-LLM's (epf), alibaba's, MinfanZhao's.  "
    "[default: mcore]",
)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Ranks to split over.")
@click.option("--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline ranks of megatron.")
@click.option("--vp", type=click.IntRange(min=1), default=1, show_default=True, help="Virtual stages of a rank.")
@click.option("--pp-layers", metavar="N,N,...", help="Layers of each stage, where the split is uneven.")
@click.option(
    "--adapter",
    type=click.Path(file_okay=False, path_type=Path),
    help="A LoRA adapter in PEFT's format (adapter_config.json), merged into the weights.",
)
@click.option(
    "--add-token", "tokens", multiple=True, metavar="TOKEN", help="Add a token to the vocabulary; again for more."
)
@click.option(
    "--new-rows",
    type=click.Choice(["mean", "zeros"]),
    default="mean",
    show_default=True,
    help="The embedding's and the head's rows of added tokens: the mean of the old rows, or zeros.",
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Cast every tensor; left out, each keeps its stored type.")
@click.option("--shape", help="A row of the size table, as llama2_7b: checked, and used where the source says nothing.")
@click.option("--source-dialect", help="The dialect of a Megatron source, where its files leave it in doubt.")
@click.option("--vocab", type=click.IntRange(min=1), help="True rows of a Megatron source's padded vocabulary.")
@click.option("--no-hash", is_flag=True, help="Take no SHA-256 of the weights: faster, and nothing can check them.")
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinite values instead of refusing them.")
@click.option("--dry-run", is_flag=True, help="Print every tensor's route, the disk and the time needed, and stop.")
@with_log
def command(
    source: Path,
    output: Path,
    to: str,
    dialect: str | None,
    tp: int,
    pp: int,
    vp: int,
    pp_layers: str | None,
    adapter: Path | None,
    tokens: tuple[str, ...],
    new_rows: str,
    dtype: str | None,
    shape: str | None,
    source_dialect: str | None,
    vocab: int | None,
    no_hash: bool,
    allow_nonfinite: bool,
    dry_run: bool,
) -> None:
    """Convert weights of any supported format, found out by itself, into a checkpoint or another format.

    SOURCE is a directory of Hugging Face's, Meta's, Megatron's (any fork, any TP x PP) or EasyLM's. A checkpoint is a
    Hugging Face directory with a manifest.json: transformers opens it as it is.

    \b
    Example:
      llmpipe convert weights/tiny_llama --output scratch/checkpoint
    """
    from llmpipe.checkpoint import convert
    from llmpipe.checkpoint.changes import Changes
    from llmpipe.checkpoint.formats import Told
    from llmpipe.errors import UserError
    from llmpipe.families import named_size
    from llmpipe.layout import Stages, parse_layers

    if dialect and to != "megatron":
        raise UserError(
            f"--dialect {dialect} is one of --to megatron, not of --to {to}: name the format, or leave it out"
        )
    told = Told(named_size(shape) if shape else None, source_dialect, vocab)
    cast = convert.DTYPES[dtype] if dtype else None
    target = convert.Target(to, dialect or "mcore", tp, Stages(pp, vp, parse_layers(pp_layers)), cast)  # type: ignore[arg-type]
    changes = Changes(adapter, tokens, new_rows)  # type: ignore[arg-type]
    if dry_run:
        click.echo("\n".join(convert.plan_convert(source, output, target, told, changes)))
    else:
        convert.convert(source, output, target, told, not no_hash, allow_nonfinite, changes)

"""What weights are written as, on the command line: the format's options of convert and export."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llmpipe.checkpoint.convert import Target

FORMATS = ("hf", "meta", "megatron", "easylm")
DIALECTS = ("mcore", "legacy", "epf", "ali", "mfz")
DTYPES = ("bf16", "fp16", "fp32")


def with_target(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --to, --dialect, --tp, --pp, --vp, --pp-layers and --dtype to a command, see `target`."""
    one = {"type": click.IntRange(min=1), "default": 1, "show_default": True}
    for option in (
        click.option("--dtype", type=click.Choice(DTYPES), help="Cast every tensor; left out, each keeps its type."),
        click.option("--pp-layers", metavar="N,N,...", help="Layers of each stage, where the split is uneven."),
        click.option("--vp", **one, help="Virtual stages of a rank."),
        click.option("--pp", **one, help="Pipeline ranks of megatron."),
        click.option("--tp", **one, help="Ranks to split over."),
        click.option(
            "--dialect",
            type=click.Choice(DIALECTS),
            help="Of --to megatron: Megatron-LM's (mcore, legacy), Megatron-LLM's (epf), alibaba's, MinfanZhao's.  "
            "[default: mcore]",
        ),
        click.option(
            "--to",
            type=click.Choice(FORMATS),
            default="hf",
            show_default=True,
            help="The format to write; hf is what llmpipe's other stages take, too.",
        ),
    ):
        function = option(function)
    return function


def target(
    to: str, dialect: str | None, tp: int, pp: int, vp: int, pp_layers: str | None, dtype: str | None
) -> "Target":
    """The options as the writers take them; UserError for those that do not fit the format."""
    from llmpipe.checkpoint.convert import DTYPES as TYPES
    from llmpipe.checkpoint.convert import Target
    from llmpipe.errors import UserError
    from llmpipe.layout import Stages, parse_layers

    if dialect and to != "megatron":
        raise UserError(
            f"--dialect {dialect} is one of --to megatron, not of --to {to}: name the format, or leave it out"
        )
    stages = Stages(pp, vp, parse_layers(pp_layers))
    return Target(to, dialect or "mcore", tp, stages, TYPES[dtype] if dtype else None)  # type: ignore[arg-type]

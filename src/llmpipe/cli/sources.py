"""What can be said of foreign weights on the command line, where their files leave something in doubt."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llmpipe.checkpoint.formats import Told


def with_told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --shape, --source-dialect and --vocab to a command, see `told`."""
    for option in (
        click.option("--vocab", type=click.IntRange(min=1), help="True rows of a Megatron directory's vocabulary."),
        click.option(
            "--source-dialect", help="The dialect of a Megatron directory, where its files leave it in doubt."
        ),
        click.option(
            "--shape", help="A row of the size table, as llama2_7b, where the files say nothing; else checked."
        ),
    ):
        function = option(function)
    return function


def told(shape: str | None, source_dialect: str | None, vocab: int | None) -> "Told":
    """The three options as the readers take them."""
    from llmpipe.checkpoint.formats import Told
    from llmpipe.families import named_size

    return Told(named_size(shape) if shape else None, source_dialect, vocab)

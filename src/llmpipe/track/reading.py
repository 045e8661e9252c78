"""A file of a run that cannot be read is told as such, and not as a fault of MLflow's store."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmpipe.errors import UserError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block `path`, or what is in it, is read; UserError naming the file if that fails."""
    try:
        yield
    except OSError as error:
        which = error.filename or path  # reading itself, of an open file, names none
        raise UserError(f"{which} cannot be read: {error.strerror or error}; mend that, then track again") from error

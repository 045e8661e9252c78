"""The checkpoints that a folder of them holds, by their names."""

import re
from pathlib import Path


def saved(folder: Path, at_most: int) -> list[Path]:
    """The folder's checkpoints, whole or not, of at most so many steps, the newest first.

    Later ones are there where a recipe's `steps` was lowered: they are of a longer training, and left alone.
    """
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]  # not a copy, .bak
    return sorted((path for path in found if step_of(path) <= at_most), reverse=True)


def step_of(directory: Path) -> int:
    """The steps of a checkpoint, by its name."""
    return int(directory.name.removeprefix("step-"))

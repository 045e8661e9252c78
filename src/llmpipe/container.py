"""The container that llmpipe's commands run in, where one is named: `llmpipe` starts itself again inside.

    export LLMPIPE_CONTAINER='apptainer exec --nv --bind /data /images/llmpipe.sif'

The variable holds what comes before a command to run it there; the command is the image's own `llmpipe`. A training
that srun has to start on each node enters there (cli/finetune.py), for images seldom have an srun that works.
"""

import os
import shlex
import sys

from llmpipe.errors import UserError

PREFIX = "LLMPIPE_CONTAINER"


def is_named() -> bool:
    """Whether there is a container which this process is not in."""
    return bool(os.environ.get(PREFIX))


def enter() -> None:
    """Become this command in the container, if there is one to enter; inside the variable is not set."""
    try:
        prefix = shlex.split(os.environ.pop(PREFIX, ""))
    except ValueError as error:
        raise UserError(f"{PREFIX}: {error}") from None
    if not prefix:
        return
    try:
        os.execvp(prefix[0], [*prefix, "llmpipe", *sys.argv[1:]])
    except OSError as error:
        raise UserError(f"{PREFIX}: {prefix[0]} cannot be started: {error.strerror}") from None

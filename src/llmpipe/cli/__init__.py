"""The llmpipe command: a lazy group, so that --help is instant; one file per command, torch imported in bodies."""

import atexit
import errno
import gc
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

import llmpipe
from llmpipe import container
from llmpipe.errors import UserError, nearest

COMMANDS = (
    "download", "tokenize", "convert", "verify", "shard", "merge", "finetune", "evaluate", "export", "inspect", "diff",
    "track", "report", "doctor",
)  # fmt: skip


_MAKE_ROOM = "make room, then run this again; nothing half-written has taken its name"
_ELSEWHERE = "name another place"
_ALLOWED = "get the right to it from its owner, or name another place"
_PLACES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "raise the limit (ulimit -f), or name a place whose file system holds larger files",
    errno.EIO: "the disk itself fails: read or write it elsewhere",
    errno.EMFILE: "raise the limit (ulimit -n), then run this again",
    errno.EACCES: _ALLOWED,
    errno.EPERM: _ALLOWED,
    errno.EROFS: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
    errno.ENOTDIR: _ELSEWHERE,
    errno.EISDIR: _ELSEWHERE,
    errno.ENAMETOOLONG: _ELSEWHERE,
    errno.ELOOP: "a link leads to itself: put what is meant in its place",
}
"""What the user can mend where the system refuses a file; every other OSError keeps its traceback."""

URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
"""MLflow's own; the workflow sets them to what config/config.yaml says."""

LOG_FILE = "llmpipe.log_file"
"""Where `ctx.meta` has the path of --log, for a command that starts processes of its own."""


class Group(click.Group):
    """Finds `llmpipe NAME` as `llmpipe.cli.NAME.command`; lists the stages in the order of the flow."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:
            ctx.fail(f"there is no command {cmd_name!r}: {nearest(cmd_name, COMMANDS)}")
        return importlib.import_module(f"llmpipe.cli.{cmd_name}").command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(llmpipe.__version__, prog_name="llmpipe")
def group() -> None:
    """Fine-tune Llama-family models, every stage a file made from files.

    Each command is a stage of the pipeline and can be run by hand; the Snakemake rules call the same commands.
    Results go to files, progress and logs to stderr.
    """


def with_log(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --log FILE to a command and set up logging from it."""

    def opened(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
        from llmpipe.progress import configure_logging

        configure_logging(*([value] if value else []))
        if value:  # so that a rule's command can be copied from its log and run by hand
            logging.getLogger(__name__).info("$ llmpipe %s", shlex.join(sys.argv[1:]))
        ctx.meta[LOG_FILE] = value

    return click.option(
        "--log",
        type=click.Path(dir_okay=False, path_type=Path),
        callback=opened,
        expose_value=False,
        is_eager=True,
        help="Write log lines to this file; a terminal then shows only the bar and warnings.",
    )(function)


def main() -> None:
    """The entry point: a UserError becomes one line on stderr and in the log, and exit status 1."""
    # Threads that spin while they wait take the cores from other processes: evaluate was eight times slower beside one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(50_000, 20)  # torch and transformers make a million objects that stay: a tenth of their start
    atexit.register(gc.freeze)  # else the last of Python's work is half a second of looking for garbage in all of torch
    try:
        if sys.argv[1:2] != ["finetune"]:  # which enters later: where several nodes are to train, on each of them
            container.enter()
        group.main(prog_name="llmpipe", standalone_mode=True)
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in _PLACES:
            raise
        _fail(f"{error.strerror}{f': {error.filename}' if error.filename else ''}: {_PLACES[error.errno]}")


def _fail(message: str) -> NoReturn:
    log = logging.getLogger(__name__)
    if log.hasHandlers():
        log.error("%s", message)
    else:
        click.echo(f"ERROR {message}", err=True)
    sys.exit(1)

"""The files of stages, mirrored to MLflow (design decision 17): files are the truth, this may be lost."""

import logging
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from llmpipe.errors import UserError
from llmpipe.files import write_json
from llmpipe.progress import progress
from llmpipe.track.folders import subjects
from llmpipe.track.plot import plot_loss
from llmpipe.track.reading import reading
from llmpipe.track.store import locked, quieten
from llmpipe.track.subject import Subject
from llmpipe.track.writer import Writer, bring_locked
from llmpipe.train.run_folder import is_finished, read_metrics

FOLLOW_SECONDS = 5.0  # between two looks at files that grow
LONGEST_WAIT = 60.0  # before a store that did not answer is tried again
LAST_SECONDS = 60  # for the last look, when the training has ended
T = TypeVar("T")
log = logging.getLogger(__name__)


def track(results: Path, uri: str, experiment: str, output: Path | None = None) -> None:
    """Mirror what is in `results`; `output` is written last and says what was mirrored where."""
    found = _read(results)
    quieten()
    plot = _plot(found[0], output.parent) if output and len(found) == 1 else None
    mirrored = _told(results, uri, partial(_mirror, found, uri, experiment, plot))
    if output:
        write_json(output, {"uri": uri, "experiment": experiment, "runs": mirrored})


def follow(results: Path, uri: str, experiment: str) -> None:
    """Mirror what is in `results` again and again, until its one run has ended, or SIGTERM comes: then once more.

    A store that does not answer is a line in the log, and is tried again later.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # it tries again itself
    quieten()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a request is not cut off
    writer: Writer | None = None
    wait, asked = FOLLOW_SECONDS, False
    while True:
        try:
            writer = writer or _told(results, uri, partial(_open, uri, experiment, results))
            found = _read(results)
            ended = _told(results, uri, partial(_follow_once, writer, found))
            wait = FOLLOW_SECONDS
        except UserError as error:
            writer, ended, wait = None, False, min(2 * wait, LONGEST_WAIT)
            log.warning("%s; tried again in %.0f s", error, wait)
        if ended or asked:
            return
        if signal.sigtimedwait({signal.SIGTERM}, wait):
            asked = True
            signal.alarm(LAST_SECONDS)  # ends this process, whatever it waits for


def _read(results: Path) -> list[Subject]:
    """What there is to mirror."""
    with reading(results):
        return subjects(results)


def _told(results: Path, uri: str, work: Callable[[], T]) -> T:
    """What `work` returns; UserError, saying what to do, for a store that cannot be written."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return work()
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"the tracking store {uri} cannot be written: {str(error).partition(chr(10))[0] or type(error).__name__}."
            f" Only the copy is missing, the files in {results} are whole: start the store or name another with --uri,"
            " then track again"
        ) from error


def _plot(subject: Subject, folder: Path) -> Path | None:
    lines = read_metrics(subject.folder, True) if is_finished(subject.folder) else []
    if not lines:
        return None
    plot_loss(lines, f"{subject.name}: training loss", folder / "loss.svg")
    return folder / "loss.svg"


def _open(uri: str, experiment: str, results: Path) -> Writer:
    with locked(uri, results):
        return Writer(uri, experiment)


def _mirror(found: list[Subject], uri: str, experiment: str, plot: Path | None) -> list[dict[str, str]]:
    writer = _open(uri, experiment, found[0].folder)
    if len(found) > 1:
        writer.learn_all()
    mirrored = []
    with progress("track", len(found), "run") as shown:
        for subject in found:
            run_id = bring_locked(writer, subject)
            if plot:
                writer.log_artifact(run_id, plot.name, plot)
            told = {"name": subject.name, "kind": subject.kind, "digest": subject.digest, "mlflow_run": run_id}
            mirrored.append(told)
            shown.add(1, subject.name)
    return mirrored


def _follow_once(writer: Writer, found: list[Subject]) -> bool:
    """One look; whether that was the last one: the folder is a run's, which had ended when it was read."""
    for subject in found:
        bring_locked(writer, subject)
    return len(found) == 1 and found[0].kind == "run" and bool(found[0].digest)

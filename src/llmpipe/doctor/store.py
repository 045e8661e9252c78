"""MLflow's store: whether what config/config.yaml names can be reached. Trainings do not need it."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from llmpipe.config import Project, Tracking
from llmpipe.doctor.finding import Finding, note, ok
from llmpipe.doctor.machine import file_system, is_shared
from llmpipe.errors import UserError
from llmpipe.track.store import sqlite_file
from llmpipe.yaml_file import load

CONFIG = Path("config/config.yaml")
SECONDS = 3
LATER = "nothing is lost: start it, or name another in config/config.yaml, and llmpipe track catches up"


def store(uri: str | None) -> Iterator[Finding]:
    """The store that is named, or the project's."""
    try:
        uri = uri or (load(Project, CONFIG).tracking.uri if CONFIG.is_file() else Tracking().uri)
    except UserError as error:
        yield note("MLflow", str(error), "mend the file")
        return
    database = sqlite_file(uri)
    if database is not None:
        yield _database(database)
    elif uri.startswith(("http://", "https://")):
        yield _server(uri)
    else:
        yield note("MLflow", f"{uri} was not looked at", "only sqlite files and servers are")


def _database(path: Path) -> Finding:
    kind = file_system(next(parent for parent in path.parents if parent.exists()))
    if is_shared(kind):
        advice = "only one machine may write it; a server is safer: tracking: {uri: http://HOST:5000}"
        return note("MLflow", f"{path} lies on a shared file system ({kind})", advice)
    if not path.exists():
        return ok("MLflow", f"{path} is not there yet: the first tracking makes it")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=SECONDS)) as connection:
            (count,) = connection.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        advice = "move it away and track again: it is a copy of the files in results"
        return note("MLflow", f"{path} cannot be read: {error}", advice)
    if not os.access(path, os.W_OK):
        return note("MLflow", f"{path} may not be written", LATER)
    return ok("MLflow", f"{path}, {count:,} runs")


def _server(uri: str) -> Finding:
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=SECONDS):
            return ok("MLflow", f"the server at {uri} answers")
    except HTTPError as error:
        return note("MLflow", f"the server at {uri} answers with status {error.code}", "does it ask for a password?")
    except (OSError, ValueError) as error:
        return note("MLflow", f"the server at {uri} does not answer: {error}", LATER)

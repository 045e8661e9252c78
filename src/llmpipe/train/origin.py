"""Where a training comes from, for the record: job.json and run.json keep it, and MLflow's tags show it."""

import getpass
import hashlib
import os
import secrets
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from llmpipe.files import HOST, read_json, write_json
from llmpipe.programs import ask
from llmpipe.train.job import Job

TRAINING = "training.json"
"""What a training is known by, among its checkpoints."""
GIT_SECONDS = 10


def with_origin(job: Job) -> Job:
    """The job, told where it comes from."""
    return replace(job, origin=_training(job.checkpoints / TRAINING) | _here(job))


def _training(path: Path) -> dict[str, str]:
    """What all attempts have in common, kept beside their checkpoints: what starts anew has another id."""
    if not path.is_file():
        write_json(path, {"training": secrets.token_hex(16), "started_ms": str(int(1000 * time.time()))})
    return read_json(path, "remove it: the training then counts as a new one in MLflow")


def _here(job: Job) -> dict[str, str]:
    """This attempt."""
    configs = "".join(Path(path).read_text() for path in job.config_files if Path(path).is_file())
    return {
        "git_commit": _commit(),
        "config_digest": hashlib.sha256(configs.encode()).hexdigest(),
        "command": shlex.join(["llmpipe", *sys.argv[1:]]),
        "host": HOST,
        "user": _user(),
    }


def _commit() -> str:
    """The project's commit, `-dirty` where tracked files differ from it; empty where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = ask(*command, seconds=GIT_SECONDS, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a name for this number
        return str(os.getuid())

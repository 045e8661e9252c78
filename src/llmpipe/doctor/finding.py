"""What a check found."""

import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from llmpipe.programs import ask

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `llmpipe doctor`."""

    verdict: Literal["ok", "note", "mend"]
    """note: something optional is missing, or small; mend: something needed is broken."""
    name: str
    found: str
    advice: str = ""
    """What to do."""


def ok(name: str, found: str) -> Finding:
    return Finding("ok", name, found)


def note(name: str, found: str, advice: str = "") -> Finding:
    return Finding("note", name, found, advice)


def mend(name: str, found: str, advice: str) -> Finding:
    return Finding("mend", name, found, advice)


def told_by(*command: str, seconds: float = 3) -> tuple[list[str] | None, str]:
    """The lines that a command prints, and why there are none: (None, "") if there is no such command."""
    if shutil.which(command[0]) is None:
        return None, ""
    try:
        done = ask(*command, seconds=seconds)
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} did not answer in {seconds:g} s"
    except OSError as error:
        return None, f"{command[0]} cannot be started: {error.strerror}"
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return None, why[-1] if why else f"{command[0]} ended with status {done.returncode}"
    return [line for line in done.stdout.splitlines() if line.strip()], ""

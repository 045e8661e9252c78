"""Files that appear whole or not at all: written aside, fsynced, renamed (design decision 16)."""

import ctypes
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import IO, Any

from llmpipe.errors import UserError

CHUNK_BYTES = 8 << 20
HOST = socket.gethostname().partition(".")[0]
_WRITEBACK_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin to write, wait for nothing
_sync_file_range = ctypes.CDLL(None).sync_file_range  # without the GIL; the os module lacks it
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def aside(path: Path) -> Path:
    """The temporary sibling of a path; host and pid keep two writers apart, on a shared file system as well."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.part")


def remove_left(path: Path) -> None:
    """Remove what killed writers on this machine left beside a path: a half-made checkpoint can be large."""
    mine = f".{path.name}.{HOST}-"
    for left in path.parent.glob(f"{escape(mine)}*"):
        pid, _, kind = left.name.removeprefix(mine).partition(".")
        if kind in ("part", "old") and pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def atomic_file(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """A file to write that takes its name only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path)
    part = aside(path)
    try:
        with part.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fsync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes its name only when the block ends without an error; it replaces an older one."""
    path = path.resolve()  # a link to a directory stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path)
    part = aside(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                fsync(file)
        if path.exists():  # a directory cannot be renamed over a full one
            old = part.with_suffix(".old")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def matching(pattern: Path) -> list[Path]:
    """The files that a name with * stands for, sorted."""
    return sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, indented, with a newline at its end."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str) -> Any:
    """A JSON file; UserError with the remedy if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class EarlyWriteback:
    """Has the disk begin on a file while it is being written from its start on: fsync then finds little left."""

    def __init__(self, descriptor: int):
        self._descriptor, self._begun = descriptor, 0

    def reached(self, end: int) -> None:
        """The file is written up to `end`. A wish: where the system refuses it, fsync does all."""
        if end - self._begun >= _WRITEBACK_BYTES:
            _sync_file_range(self._descriptor, self._begun, end - self._begun, _SYNC_FILE_RANGE_WRITE)
            self._begun = end


def fsync(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Force a directory's entries, and so the renames in it, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""SHA-256 of files, two streams at a time: the compiled helper where the processor has the instructions, else hashlib.

Hashing is half of the work of moving weights, so whoever writes a file also hashes the files that it is made of: each
piece of its own together with a piece of theirs, which costs a core little more than one of the two.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self

from llmpipe import helpers

Bytes = Any  # an array or a memoryview of bytes
_PIECE_BYTES = 1 << 18  # two of them, and what is being moved, fit a core's cache


class Hash(Protocol):
    """The SHA-256 of a stream of bytes."""

    def update(self, data: Bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def new_hash() -> Hash:
    """The SHA-256 of nothing yet."""
    return helpers.Sha256() if hasattr(helpers, "Sha256") else hashlib.sha256()


def update_two(a: Hash, data_a: Bytes, b: Hash, data_b: Bytes) -> None:
    """Go on with two streams at once."""
    if hasattr(helpers, "Sha256") and isinstance(a, helpers.Sha256) and isinstance(b, helpers.Sha256):
        helpers.Sha256.update_two(a, data_a, b, data_b)
    else:
        a.update(data_a)
        b.update(data_b)


class FileHashes:
    """The SHA-256 of files, taken piece by piece by any threads; a context that closes them."""

    def __init__(self, paths: Iterable[Path] = ()):
        self._waiting = [_Stream(path) for path in paths]
        self._done: dict[Path, str] = {}
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._waiting:
            stream.close()

    def beside(self, digest: Hash, data: Bytes) -> None:
        """Go on with `digest` by `data`, and with one of the files by as many bytes."""
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            with self._taken() as stream:
                if stream is None:
                    digest.update(piece)
                else:
                    update_two(digest, piece, stream.digest, stream.read(len(piece)))

    def of(self, path: Path) -> str:
        """The SHA-256 of one more file in hexadecimal, taken here, with the files' beside it."""
        digest, buffer = new_hash(), memoryview(bytearray(_PIECE_BYTES))
        with FileIO(path) as file:
            while count := file.readinto(buffer):
                self.beside(digest, buffer[:count])
        return digest.hexdigest()

    def found(self, path: Path, digest: str) -> None:
        """Whoever read the whole file has its SHA-256: it is not hashed again, unless a thread is at it."""
        with self._lock:
            known = [stream for stream in self._waiting if stream.path == path]
            self._waiting = [stream for stream in self._waiting if stream.path != path]
            self._done |= {stream.path: digest for stream in known}
        for stream in known:
            stream.close()

    def results(self) -> dict[Path, str]:
        """The SHA-256 of each file in hexadecimal; what is left of them is hashed on every core."""
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(cores) as pool:
            for done in [pool.submit(self._finish, cores) for _ in range(cores)]:
                done.result()
        return self._done

    def _finish(self, cores: int) -> None:
        """One thread's share: two files at a time while every core has one."""
        while self._waiting:
            with self._taken() as first, self._taken(above=cores - 1) as second:
                if first and second:
                    update_two(first.digest, first.read(_PIECE_BYTES), second.digest, second.read(_PIECE_BYTES))
                elif first:
                    first.digest.update(first.read(_PIECE_BYTES))

    @contextmanager
    def _taken(self, above: int = 0) -> "Iterator[_Stream | None]":
        """The first file that no other thread is hashing, if more than `above` are left: in order, as they are read."""
        with self._lock:
            stream = self._waiting.pop(0) if len(self._waiting) > above else None
        try:
            yield stream
        finally:
            if stream:
                with self._lock:
                    self._waiting[:0] = [] if stream.ended else [stream]
                    self._done |= {stream.path: stream.digest.hexdigest()} if stream.ended else {}


class _Stream:
    """A file and how far it is hashed; it is open from its first piece to its last."""

    def __init__(self, path: Path):
        self.path, self.digest, self.ended = path, new_hash(), False
        self._file: FileIO | None = None
        self._buffer = memoryview(b"")

    def read(self, size: int) -> memoryview:
        """The next bytes, valid until the next call; none at the end of the file."""
        if self._file is None:
            self._file, self._buffer = FileIO(self.path), memoryview(bytearray(_PIECE_BYTES))
        count = self._file.readinto(self._buffer[:size])
        if count == 0:
            self.ended = True
            self.close()
        return self._buffer[:count]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

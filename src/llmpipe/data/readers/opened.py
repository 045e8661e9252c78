"""A corpus file opened, plain, .gz or .zst: a stream of unpacked bytes."""

import errno
import gzip
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llmpipe.errors import UserError

PACKED = (".gz", ".zst")


def is_packed(path: Path) -> bool:
    """Whether a file has to be read from its beginning."""
    return path.name.endswith(PACKED)


class Opened:
    """The unpacked bytes of a file, a plain one's from `start` on; UserError for a damaged one."""

    def __init__(self, path: Path, start: int = 0):
        assert not (start and is_packed(path)), path
        self.path = path
        self._raw: Any = path.open("rb", buffering=0 if not is_packed(path) else -1)
        self._raw.seek(start)
        self._unpacked: Any = self._raw
        if path.suffix == ".gz":
            self._unpacked = gzip.GzipFile(fileobj=self._raw)
        elif path.suffix == ".zst":
            self._unpacked = _zstd(self._raw)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        try:
            return self._unpacked.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{self.path} is truncated or no gzip file: {error}") from error
        except OSError as error:
            if error.errno in errno.errorcode:
                raise  # the disk's
            raise UserError(f"{self.path} is truncated or no zstd file: {error}") from error

    @property
    def position(self) -> int:
        """How much of the file itself is read, in bytes."""
        return self._raw.tell()


def _zstd(raw: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")

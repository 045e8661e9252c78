"""A file that gets a line of JSON with each step of a training, which no full disk ends."""

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class LineFile:
    """Adds lines to a file; those that the disk does not take wait in memory for the next one."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        """Of the lines that stand there."""
        self.waiting = b""
        self.has_failed = False

    def add(self, line: dict[str, Any]) -> None:
        """One more line; a warning, the first time, where the disk does not take it."""
        self.waiting += json.dumps(line).encode() + b"\n"
        try:
            self.write()
        except OSError as error:
            if not self.has_failed:
                log.warning(
                    "%s is not written: %s: its lines wait in memory, and each step tries again", self.path, error
                )
            self.has_failed = True

    def write(self) -> None:
        """Write the lines that wait; OSError where the disk does not take them."""
        if self.has_failed:
            os.truncate(self.path, self.size)  # a part of them may stand there
        with self.path.open("ab") as file:
            file.write(self.waiting)
        self.size += len(self.waiting)
        self.waiting, self.has_failed = b"", False

    def read(self) -> list[dict[str, Any]]:
        """All lines, those that wait as well."""
        return [json.loads(line) for line in (self.path.read_bytes()[: self.size] + self.waiting).splitlines()]

"""How long work shows itself: a bar on a terminal, plain lines in a log."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from tqdm import tqdm

LINE_SECONDS = 10.0
log = logging.getLogger(__name__)


class Progress:
    """Counts what is done of a total; `note` is what the bar or the line says beside the count."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.start = self.last_line = time.monotonic()
        self._lock = Lock()
        # On a terminal the lines go to the log alone, see `configure_logging`, so that they do not cut the bar.
        self.bar = tqdm(total=total, desc=label, unit=unit, unit_scale=total >= 10_000, disable=not sys.stderr.isatty())

    def add(self, count: int, note: str = "") -> None:
        """`count` more units are done; threads may call it."""
        with self._lock:
            self.done += count
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
            now = time.monotonic()
            if now - self.last_line >= LINE_SECONDS:
                self.last_line = now
                log.info("%s: %s of %s %s%s", self.label, self.done, self.total, self.unit, f", {note}" if note else "")

    def close(self) -> None:
        """The work has ended, one way or the other."""
        self.bar.close()
        log.info("%s: %s %s in %.1f s", self.label, self.done, self.unit, time.monotonic() - self.start)


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """A `Progress` over a block."""
    shown = Progress(label, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def configure_logging(*log_files: Path) -> None:
    """Lines of INFO and above go to the files and to stderr; a terminal beside a log file sees warnings and bars."""
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.INFO)
    stderr = logging.StreamHandler()
    for log_file in log_files:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(logging.FileHandler(log_file))
    if log_files and sys.stderr.isatty():
        stderr.setLevel(logging.WARNING)
    root.addHandler(stderr)
    for handler in root.handlers:
        handler.setFormatter(form)
    for chatty in ("httpx", "httpx2", "urllib3", "alembic", "fsspec", "filelock", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)

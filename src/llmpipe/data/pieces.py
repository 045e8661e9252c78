"""A large corpus is written in pieces, so that a killed run goes on with those that it finished.

They are datasets in the hidden folder .NAME.pieces/KEY beside PREFIX, each with a .counts.json that is written last.
The key is a hash of all that decides the tokens: other pieces are never taken but removed.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from llmpipe.data.dataset.join import lay_end_to_end
from llmpipe.data.dataset.join_parts import join_rejects
from llmpipe.data.dataset.manifest import suffixed
from llmpipe.data.parts import cut
from llmpipe.data.readers.block import Span
from llmpipe.data.stream import Counts, Stream
from llmpipe.errors import UserError
from llmpipe.files import write_json

PIECE_BYTES = 256 << 20
log = logging.getLogger(__name__)


def write(stream: Stream, spans: list[Span], prefix: Path, key: str, check: Callable[[Counts], None]) -> Counts:
    """The dataset of some spans, in pieces if it is large; `check` may refuse what was read, before it is named."""
    count = -(-sum(span.stop - span.start for span in spans) // PIECE_BYTES)
    if count <= 1:
        return stream.write(spans, prefix, Counts(), check)
    folder = prefix.with_name(f".{prefix.name}.pieces")
    with _locked(folder, prefix):
        for other in folder.iterdir():
            if other.name != key:
                shutil.rmtree(other)
        counts, pieces = Counts(), []
        for number, piece in enumerate(cut(spans, count), start=1):
            pieces.append(folder / key / f"{number:05}")
            counts += _piece(stream, piece, pieces[-1], counts)
        check(counts)
        lay_end_to_end(pieces, prefix)
        join_rejects(pieces, prefix)
        shutil.rmtree(folder)
    return counts


def _piece(stream: Stream, spans: list[Span], prefix: Path, before: Counts) -> Counts:
    """The counts of a piece, which is written if an earlier run has not finished it."""
    finished = suffixed(prefix, ".counts.json")
    if finished.is_file():
        log.info("%s: finished by an earlier run", prefix)
        stream.shown(sum(span.stop - span.start for span in spans), "finished earlier")
        return Counts(**json.loads(finished.read_text()))
    counts = stream.write(spans, prefix, before)
    write_json(finished, asdict(counts))
    return counts


@contextmanager
def _locked(folder: Path, prefix: Path) -> Iterator[None]:
    """No other run on this machine writes the same pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            f"another llmpipe tokenize is writing {prefix}: wait for it, or name another --output"
        ) from error
    finally:
        os.close(descriptor)

"""Spans of a corpus to one dataset, streamed: blocks are read here, encoded by workers, and written here in order."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from llmpipe.data.dataset.indexed import Writer
from llmpipe.data.dataset.manifest import ROLES, rejects_path, retire, suffixed
from llmpipe.data.dataset.roles import DTYPE
from llmpipe.data.encoding.encoded import Encoded, Reject
from llmpipe.data.encoding.encoders import Encoder
from llmpipe.data.readers.block import Block, Span
from llmpipe.data.sources import blocks
from llmpipe.data.workers import Workers
from llmpipe.errors import UserError
from llmpipe.files import atomic_file


@dataclass(frozen=True, slots=True)
class Counts:
    """What is in a dataset, and what was left out of it."""

    documents: int = 0
    empty_documents: int = 0
    rejected_rows: int = 0
    split_chats: int = 0
    dropped_chats: int = 0
    tokens: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: number + getattr(other, name) for name, number in asdict(self).items()})


@dataclass(frozen=True, slots=True)
class Stream:
    """How spans become a dataset."""

    encoder: Encoder
    dtype: np.dtype[Any]
    workers: Workers[Encoded]
    skip_bad: int
    """How many bad rows may be left out, of the whole corpus."""
    shown: Callable[[int, str], None]
    """Is told the bytes of the corpus that are done, and of which file."""

    def write(
        self, spans: list[Span], prefix: Path, before: Counts, check: Callable[[Counts], None] = lambda _: None
    ) -> Counts:
        """The dataset of some spans; UserError for bad rows.

        `before` counts what is of the same corpus and written; `check` may refuse what was read, before it is named.
        """
        with ExitStack() as stack:
            writer = stack.enter_context(Writer(prefix, self.dtype))  # the last to take its name
            roles = stack.enter_context(Writer(suffixed(prefix, ROLES), DTYPE)) if self.encoder.has_roles else None
            rejects = stack.enter_context(atomic_file(rejects_path(prefix), "w")) if self.skip_bad else None
            counts = Counts()
            for found in self.workers.in_order(self._blocks(spans)):
                rejected = before.rejected_rows + counts.rejected_rows
                self._note_rejects(found.rejects, rejected, rejects)
                writer.add(found.tokens, found.sizes)
                if roles:
                    assert found.roles is not None
                    roles.add(found.roles, found.sizes)
                counts += _counted(found)
                self.shown(found.read, found.path.name)
            check(counts)
            retire(prefix)
        if not counts.rejected_rows:
            rejects_path(prefix).unlink(missing_ok=True)
        return counts

    def _blocks(self, spans: list[Span]) -> Iterator[Block]:
        for span in spans:
            yield from blocks(span, self.encoder.keys, self.encoder.optional)

    def _note_rejects(self, rejects: list[Reject], before: int, file: IO[str] | None) -> None:
        """Write bad rows down; UserError for the first that is one too many."""
        for number, reject in enumerate(rejects, start=before + 1):
            if number > self.skip_bad:
                more = f"; it is bad row {number} of the corpus, and --skip-bad lets {self.skip_bad} pass"
                raise UserError(f"{reject.where} {reject.reason}{more if self.skip_bad else ''}")
            assert file
            entry = {"file": str(reject.path), "line": reject.line, "reason": reject.reason}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _counted(found: Encoded) -> Counts:
    return Counts(
        documents=len(found.sizes),
        empty_documents=found.empty,
        rejected_rows=len(found.rejects),
        split_chats=found.split,
        dropped_chats=found.dropped,
        tokens=len(found.tokens),
    )

"""A corpus in parts of about equal bytes, and what a part was made of, so that only fitting parts are put together.

Part i of n of a corpus is the rows that begin in its i-th n-th of all bytes, file after file. What cannot be cut (a
.gz, a .json array, a .txt) belongs to the part that it begins in as a whole.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.data.dataset.manifest import suffixed
from llmpipe.data.readers.block import Span
from llmpipe.errors import UserError

_ENDS_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a corpus, of how many."""

    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, given: str) -> "Part":
        """`3/16`; UserError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", given)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise UserError(f"--part {given}: a part and how many there are is expected, from 1/16 to 16/16")
        return cls(int(found[1]), int(found[2]))


def cut(spans: list[Span], count: int) -> list[list[Span]]:
    """Spans, side by side, as `count` parts of equal bytes; a part may be without any."""
    total = sum(_weight(span) for span in spans)
    edges = [total * number // count for number in range(count + 1)]
    parts: list[list[Span]] = [[] for _ in range(count)]
    before = 0
    for span in spans:
        after = before + _weight(span)
        for number in range(bisect_right(edges, before) - 1, bisect_left(edges, after)):
            first, last = max(edges[number], before), min(edges[number + 1], after)
            start, stop = span.start + first - before, min(span.start + last - before, span.stop)
            parts[number].append(Span(span.path, start, stop, span.size))
        before = after
    return parts


def _weight(span: Span) -> int:
    """An empty file counts as a byte, so that it is in some part: it may be no file of its kind."""
    return max(span.stop - span.start, 1)


def part_prefix(prefix: Path, part: Part) -> Path:
    """The dataset of a part."""
    return suffixed(prefix, f".part-{part.number}-of-{part.count}")


def corpus_key(facts: dict[str, Any], files: list[Path]) -> str:
    """Which tokens a corpus gives: a hash of `facts` (rules, tokenizer) and of the ends and size of each file.

    The same on every machine that has the files, wherever they lie.
    """
    ends = [[path.stat().st_size, _ends(path)] for path in files]
    return _hash([facts, ends])


def run_key(corpus: str, spans: list[Span]) -> str:
    """Which parts of a killed run a rerun may take: of files that nobody has touched since."""
    stats = [span.path.stat() for span in spans]
    touched = [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for stat in stats]
    return _hash([corpus, [[str(span.path), span.start, span.stop] for span in spans], touched])


def _ends(path: Path) -> str:
    """The SHA-256 of a file's first and last 64 KiB: not all of it, which each of many parts would read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_ENDS_BYTES))
        file.seek(max(0, path.stat().st_size - _ENDS_BYTES))
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

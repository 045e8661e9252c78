"""A mixed corpus of code, prose and many languages, gathered from the machine's own files as JSON lines.

Files are taken in an order that depends on their names alone, until each kind has its share of the size. Documents are
whole files up to 100 KB and parts of longer ones, and the messages of translation catalogues forty at a time.

    python benchmarks/corpus.py corpus.jsonl [--megabytes 165]
"""

import argparse
import gettext
import gzip
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOTS = ["/usr/include", "/usr/lib", "/usr/local/lib", "/usr/share", sysconfig.get_paths()["purelib"]]
CODE = {".py", ".pyi", ".c", ".h", ".hpp", ".js", ".ts", ".pl", ".pm", ".tcl", ".css"}
PROSE = {".md", ".rst", ".txt", ".html", ".gz"}
DATA = {".json", ".yaml", ".xml", ".csv", ".tsv"}
SHARES = {"code": (CODE, 0.4), "prose": (PROSE, 0.25), "languages": ({".mo"}, 0.3), "data": (DATA, 0.05)}
LONGEST, MESSAGES = 100_000, 40


def files(suffixes: set[str]) -> list[Path]:
    """Every file of a kind, each once, in the order of their names' hashes."""
    found = set()
    for root in ROOTS:
        for folder, _, names in os.walk(root):
            found |= {Path(folder, name).resolve() for name in names if Path(name).suffix in suffixes}
    return sorted(found, key=lambda path: hashlib.sha1(str(path).encode()).digest())


def texts(path: Path) -> Iterator[str]:
    """The documents of a file; none if it cannot be read as text."""
    try:
        if path.suffix == ".mo":
            with path.open("rb") as file:
                messages = [text for text in gettext.GNUTranslations(file)._catalog.values() if len(text) > 1]
            for start in range(1, len(messages), MESSAGES):
                yield "\n".join(messages[start : start + MESSAGES])
            return
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode()
    except (OSError, ValueError, IndexError, EOFError):  # binary, or broken
        return
    for start in range(0, len(text), LONGEST):
        yield text[start : start + LONGEST]


def gather(output: Path, total: int) -> None:
    """Write about `total` bytes of text in documents of 20 bytes or more, the kinds in turn."""
    kinds = []
    for suffixes, share in SHARES.values():
        taken, documents = 0, []
        for text in itertools.chain.from_iterable(map(texts, files(suffixes))):
            if len(text) >= 20:
                documents.append(text)
                taken += len(text.encode())
            if taken >= total * share:
                break
        kinds.append(documents)
    with output.open("w") as file:
        order = [(i / len(kind), text) for kind in kinds for i, text in enumerate(kind)]
        for _, text in sorted(order):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{output}: {len(order)} documents, {sum(len(t.encode()) for _, t in order) / 1e6:.1f} MB of text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--megabytes", type=int, default=165)
    options = parser.parse_args()
    gather(options.output, options.megabytes * 1_000_000)

"""make_corpus.py OUTPUT: real text that every Python carries, as JSONL: a module's source or documentation a line."""

import ast
import json
import random
import sys
import sysconfig
from pathlib import Path

MAX_BYTES = 6_000_000
SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "idle_test",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
}


def documents() -> list[str]:
    """Each module's source, then its documentation strings, the modules shuffled with a fixed seed.

    The two stand side by side because the held-out text is the end of the list: were they shuffled apart, the training
    text would hold the words of the held-out text.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if not SKIPPED & set(path.relative_to(library).parts))
    random.Random(0).shuffle(paths)
    found: list[str] = []
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        found += [text for text in (source, docstrings(tree)) if text.strip()]
    return found


def docstrings(tree: ast.Module) -> str:
    """All documentation strings of a module, one after the other."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in texts if text)


def main() -> None:
    output = Path(sys.argv[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    written = 0
    with part.open("w", encoding="utf-8") as file:
        for text in documents():
            if written > MAX_BYTES:
                break
            written += file.write(json.dumps({"text": text}) + "\n")
    part.replace(output)


main()

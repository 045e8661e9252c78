"""Corpus files: which files an input stands for, which reader reads each, and the text of their rows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmpipe.data.readers import lines, table, text, values
from llmpipe.data.readers.block import BadRow, Block, Span, whole
from llmpipe.errors import UserError
from llmpipe.files import matching, read_json

READERS: dict[str, Callable[[Span, Sequence[str], Sequence[str]], Iterator[Block]]] = {
    ".jsonl": lines.blocks,
    ".json": values.blocks,
    ".parquet": table.parquet_blocks,
    ".arrow": table.arrow_blocks,
    ".txt": text.blocks,
}
PACKABLE = (".jsonl", ".json", ".txt")
SUFFIXES = (*READERS, *(kind + packed for kind in PACKABLE for packed in (".gz", ".zst")))
KINDS = ".jsonl, .json, .txt (also with .gz or .zst), .parquet and .arrow"
# What stands beside the data in a directory of `datasets`.
_BESIDE_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
log = logging.getLogger(__name__)


def blocks(span: Span, keys: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Block]:
    """The rows that begin in a span of a file, with the columns of `keys` and `optional`, or without keys with all.

    UserError for a damaged file, or one without a column that a key needs.
    """
    yield from _reader(span.path)(span, keys, optional)


def are_json_lines(files: list[Path]) -> bool:
    """Whether each file has a JSON object a line."""
    return all(_reader(path) is lines.blocks for path in files)


def _reader(path: Path) -> Callable[[Span, Sequence[str], Sequence[str]], Iterator[Block]]:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return next(reader for kind, reader in READERS.items() if name.endswith(kind))


def first_row(files: list[Path], keys: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """The first row of a corpus that is none of the bad ones; None without any."""
    for path in files:
        for block in blocks(whole(path), keys, optional):
            for _, row in block.rows():
                if not isinstance(row, BadRow):
                    return row
    return None


def find_files(inputs: list[Path]) -> list[Path]:
    """The corpus files, those of a directory sorted; UserError for what is missing or of another kind."""
    found = [file for path in inputs for file in _expand(path)]
    for path in found:
        _check_name(path)
    return found


def _check_name(path: Path) -> None:
    """UserError for a name that no manifest can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name of {str(path)!a} is not UTF-8: rename the file") from error


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _below(path)
    if not path.exists() and "*" in str(path):
        found = matching(path)
        if not found:
            raise UserError(f"{path} fits no file: name a file or a directory of {KINDS} files")
        return find_files(found)
    if not path.exists():
        raise UserError(f"{path} is missing: name a file or a directory of {KINDS} files")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path} is of a kind that llmpipe tokenize does not read: it reads {KINDS}")
    if not path.is_file():
        raise UserError(f"{path} is no regular file: write what comes out of it into one")
    return [path]


def _below(directory: Path) -> list[Path]:
    """The corpus files below a directory; hidden ones do not count."""
    other: list[Path] = []
    found = _walk(_snapshot(directory), other, ())
    if not found:
        raise UserError(f"{directory} holds no {KINDS} file, though {len(other)} other files")
    _check_splits(directory, found)
    if other:
        log.warning("%s: %d files of other kinds are left out, such as %s", directory, len(other), other[0].name)
    return found


def _walk(directory: Path, other: list[Path], above: tuple[Path, ...]) -> list[Path]:
    """The corpus files of a directory and those below it, sorted by path; `other` gets the rest of the files."""
    real = directory.resolve()
    if real in above:
        raise UserError(f"{directory} is a link to a directory above it: the files below would never end")
    if (directory / "dataset_dict.json").is_file():
        splits = read_json(directory / "dataset_dict.json", "save the dataset again")["splits"]
        names = " or ".join(str(directory / split) for split in splits)
        raise UserError(f"{directory} is a DatasetDict of {len(splits)} splits: name the one that is wanted, {names}")
    if (directory / "state.json").is_file():
        return _saved(directory)
    found = []
    for path in sorted(path for path in directory.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            found += _walk(path, other, (*above, real))
        elif path.name.endswith(SUFFIXES) and path.name not in _BESIDE_ROWS and path.is_file():
            found.append(path)
        else:
            other.append(path)
    return found


def _saved(directory: Path) -> list[Path]:
    """The files of a dataset that `datasets` saved with save_to_disk, in its order."""
    state = directory / "state.json"
    try:
        entries = read_json(state, "save the dataset again")["_data_files"]
        found = [directory / entry["filename"] for entry in entries]
    except (KeyError, TypeError) as error:
        raise UserError(f"{state} is not what save_to_disk of `datasets` writes: it lists no _data_files") from error
    for path in found:
        if not path.is_file():
            raise UserError(f"{path} is missing, though {state} lists it: save or copy the dataset again")
    return found


def _snapshot(directory: Path) -> Path:
    """The files of a repository in the hub's cache (datasets--ORG--NAME): those of its one snapshot."""
    if not (directory / "snapshots").is_dir() or not (directory / "blobs").is_dir():
        return directory
    found = sorted((directory / "snapshots").iterdir())
    if len(found) != 1:
        names = " or ".join(map(str, found)) or "none is there"
        raise UserError(f"{directory} has {len(found)} snapshots: name the one that is wanted, {names}")
    return found[0]


def _check_splits(directory: Path, files: list[Path]) -> None:
    """UserError where a directory holds more than one split as the hub names them (test-00000-of-00001.parquet):
    nobody means to train on the test split."""
    splits = {name for path in files if (name := _split(path.name))}
    if len(splits) > 1:
        example = next(path for path in files if _split(path.name) == max(splits))
        pattern = example.with_name(f"{max(splits)}-*{example.suffix}")
        raise UserError(
            f"{directory} holds the splits {', '.join(sorted(splits))}: name the files that are wanted, as {pattern}"
        )


def _split(name: str) -> str | None:
    """The split that the name of a file of the hub says, train of train-00000-of-00002.parquet."""
    return next((split for split in ("train", "validation", "test") if name.startswith(f"{split}-0")), None)

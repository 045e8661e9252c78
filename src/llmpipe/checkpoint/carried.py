"""The files beside the weights, and the byte-for-byte copies of both."""

import fcntl
from io import FileIO
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import EarlyWriteback, read_json
from llmpipe.hashing import new_hash
from llmpipe.progress import Progress

# Everything else beside a model's weights: another format's weights, pictures, a repository's own files.
CARRIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates beyond the first, NAME.jinja each, as transformers saves them."""
_LICENCES = ("LICENSE", "LICENCE", "USE_POLICY", "NOTICE")
_LARGE = ("tekken.json", "tokenizer.json")  # read by the libraries that know them
_AGAIN = "copy or download it again, or take it away"
_POINTER = b"version https://git-lfs"
_FICLONE = 0x40049409  # linux/fs.h
_WARM_BYTES = 1 << 20  # stay in a core's cache until they are hashed and written


def goes_along(name: str) -> bool:
    """Whether a file goes along with a model's weights wherever these go; config.json is a matter of the formats."""
    folder, _, file = name.rpartition("/")
    return name in CARRIED or name.startswith(_LICENCES) or (folder == TEMPLATES and file.endswith(".jinja"))


def names(directory: Path) -> list[str]:
    """The files of a model's directory that go along with its weights, relative to it."""
    files = {
        str(path.relative_to(directory)): path for path in (*directory.iterdir(), *directory.glob(f"{TEMPLATES}/*"))
    }
    found = {name: path for name, path in files.items() if goes_along(name)}
    for path in found.values():
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link that leads nowhere: put the file there, or take the link away")
    return sorted(name for name, path in found.items() if path.is_file())


def carried_files(source: Path, directory: Path, chosen: list[str] | None = None) -> dict[str, str]:
    """Copy the files that go along with the weights; returns their SHA-256. UserError for settings that are none.

    `chosen`: some of `names`; None: all.
    """
    chosen = names(source) if chosen is None else chosen
    for name in chosen:
        check_pulled(source / name)
        if name.endswith(".json") and name not in _LARGE:
            read_table(source / name)
    return {name: copy_hashed(source / name, directory / name) for name in chosen}


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file of settings; UserError if it is none."""
    table = read_json(path, _AGAIN)
    if not isinstance(table, dict):
        raise UserError(f"{path} is no table of keys: {_AGAIN}")
    return table


def check_pulled(path: Path) -> None:
    """UserError for the few lines that git leaves in a large file's place where git-lfs did not fetch it."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull in its repository")


def copy_hashed(source: Path, target: Path, shown: Progress | None = None) -> str:
    """Copy a file, as a reflink where the file system can; returns its SHA-256."""
    check_pulled(source)
    target.parent.mkdir(exist_ok=True)
    digest, buffer = new_hash(), memoryview(bytearray(_WARM_BYTES))
    with FileIO(source) as read, target.open("wb") as write:
        cloned, writeback = _reflink(read.fileno(), write.fileno()), EarlyWriteback(write.fileno())
        while count := read.readinto(buffer):
            digest.update(buffer[:count])
            if not cloned:
                write.write(buffer[:count])
                writeback.reached(write.tell())
            if shown:
                shown.add(count, source.name)
    return digest.hexdigest()


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:  # another file system, or one without reflinks
        return False
    return True

"""The files that lie beside a tokenizer: which tokens were added to it, and which mark a document."""

import json
from pathlib import Path
from typing import Any

from llmpipe.errors import UserError
from llmpipe.files import read_json, sha256

MODEL, TEKKEN, JSON = "tokenizer.model", "tekken.json", "tokenizer.json"
CONFIG, ADDED, MAP = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
FILES = (MODEL, TEKKEN, JSON, CONFIG, ADDED, MAP)
"""What a tokenizer may be made of."""


def read(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    found = read_json(path, "copy or download it again") if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object: copy or download it again")
    return found


def head(path: Path) -> dict[str, Any]:
    """A tokenizer.json, perhaps without its `model`: that comes last, and is nearly all of it."""
    if not path.is_file():
        return {}
    try:
        first = path.read_text(encoding="utf-8").partition('"model"')[0]
        found = json.loads(first.rstrip().removesuffix(",") + "}")
    except ValueError:
        found = {}
    return found if {"added_tokens", "post_processor"} <= found.keys() else read(path)


def hashes(file: Path) -> dict[str, str]:
    """The SHA-256 of each file of a tokenizer, by name; the one that decides the ids comes first."""
    names = dict.fromkeys((file.name, *FILES))
    return {name: sha256(path) for name in names if (path := file.with_name(name)).is_file()}


def added_tokens(folder: Path) -> dict[str, int]:
    """Every token that was added to the tokenizer of a folder, by name."""
    decoder = read(folder / CONFIG).get("added_tokens_decoder") or {}
    whole = head(folder / JSON).get("added_tokens") or []
    found = {token["content"]: int(number) for number, token in decoder.items()}
    return found | {token["content"]: int(token["id"]) for token in whole} | read(folder / ADDED)


def special_names(folder: Path) -> set[str]:
    """The tokens that the files of a folder call special; padding alone is none, it may be any token."""
    config = read(folder / CONFIG)
    flagged = [*(config.get("added_tokens_decoder") or {}).values(), *(head(folder / JSON).get("added_tokens") or [])]
    found: list[Any] = [token for token in flagged if token.get("special")]
    for settings in (config, read(folder / MAP)):
        more = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        found += [settings.get("bos_token"), settings.get("eos_token")]
        found += more.values() if isinstance(more, dict) else more
    return {name for name in map(_name, found) if name}


def mark(folder: Path, role: str) -> str | None:
    """The name of the `bos` or `eos` token that the files of a folder state."""
    return next((name for file in (CONFIG, MAP) if (name := _name(read(folder / file).get(f"{role}_token")))), None)


def _name(value: Any) -> str | None:
    """A token is written as its name, or as an object with it."""
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None

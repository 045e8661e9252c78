"""docs/recipes.md names every key of a recipe, and no other, with its default."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llmpipe.recipe import Recipe
from llmpipe.schema import default_of

PAGE = Path(__file__).parents[2] / "docs/recipes.md"


def keys_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of a recipe, groups by a dot, and its default."""
    found: dict[str, Any] = {}
    for entry in fields(kind):
        hint, name, default = get_type_hints(kind)[entry.name], prefix + entry.name, default_of(entry)
        group = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
        if group is None or default is None:
            found[name] = default
        if group is not None:
            found |= keys_of(group, f"{name}.")
    return found


def test_the_page_names_every_key_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.0-9]+)` \| (.*?) ?\|", PAGE.read_text(), re.MULTILINE)
    assert sorted(rows) == sorted((key, shown(default)) for key, default in keys_of(Recipe).items())


def shown(default: Any) -> str:
    """A default as the page has it, as in YAML; nothing where there is none."""
    if default is MISSING:
        return ""
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)

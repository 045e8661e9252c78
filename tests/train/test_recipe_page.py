"""Every key of a recipe: docs/recipes.md has it with its default, config/recipes with a comment."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llmpipe.config import Run
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe
from llmpipe.schema import default_of

HOUSE = Path(__file__).parents[2]
PAGE = HOUSE / "docs/recipes.md"


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


def commented(text: str) -> set[str]:
    """The keys of a YAML file that have a comment beside them, by their last name; those of examples, too."""
    return set(re.findall(r"^ *(?:# )? *([a-z_0-9]+):(?: .*?)? +# \S", text, re.MULTILINE))


def test_the_shipped_files_have_every_key_with_a_comment() -> None:
    recipes, runs = (
        {path.name: path.read_text() for path in (HOUSE / "config" / kind).glob("*.yaml")}
        for kind in ("recipes", "runs")
    )
    keys = {part for key in keys_of(Recipe) for part in key.split(".")}
    assert commented(recipes["llama2.yaml"]) | commented(recipes["sft.yaml"]) >= keys
    for text in runs.values():
        assert commented(text) >= {entry.name for entry in (*fields(Layout), *fields(Run))}
    for text in (*recipes.values(), *runs.values()):  # and no key without one
        assert commented(text) >= set(re.findall(r"^ *([a-z_0-9]+):", text, re.MULTILINE))

"""What the how-to pages say: flags and keys exist, messages are llmpipe's, numbers are the estimate's."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from commands import HOWTO, REPOSITORY
from messages import errors, texts

from llmpipe.cli import group
from llmpipe.families import named_size
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe
from llmpipe.schema import FILES, schema_of
from llmpipe.train.estimate import estimate
from llmpipe.yaml_file import load

GIB = 1 << 30
CARDS = {"80 GB": 79.6, "141 GB": 140.4}
"""GiB of an H100 and of an H200, as nvidia-smi has them."""
LIBRARIES = 3
"""GiB that CUDA and NCCL may take."""
FROM = sorted(HOWTO.glob("coming-from-*.md"))
KEY = re.compile(r"\b(recipe|layout|run|corpus|model|config) `([\w.]+)`")
OPTION = re.compile(r"`llmpipe (\w+)(?: (--[\w-]+))?`")


def tables(page: Path, head: str) -> Iterator[list[list[str]]]:
    """The rows, as cells, of each of a page's tables that have a column of this name."""
    for table in re.findall(r"(?m)(?:^\|.*\n)+", page.read_text()):
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if head in names:
            yield [row[names.index(head) :] for row in rows]


@pytest.mark.parametrize("page", FROM, ids=lambda page: page.stem)
def test_a_flag_is_answered_once_and_by_what_there_is(page: Path) -> None:
    for rows in tables(page, "flag"):
        flags = [flag for row in rows for flag in re.findall("`(.+?)`", row[0])]
        assert sorted(set(flags)) == sorted(flags) and flags
        for flag, here in rows:
            assert flag.startswith("`") and (KEY.search(here) or OPTION.search(here) or here.startswith("not "))
            for kind, key in KEY.findall(here):
                assert has_key(kind, key), (flag, kind, key)
            for command, option in OPTION.findall(here):
                assert not option or option in options(command), (flag, command, option)


def has_key(kind: str, dotted: str) -> bool:
    """Whether a kind of config file has a key, as `schedule.kind`."""
    schema = schema_of_file(kind)
    for key in dotted.split("."):
        schema = next((part for part in [schema, *schema.get("anyOf", [])] if key in part.get("properties", {})), None)
        if schema is None:
            return False
        schema = schema["properties"][key]
    return True


@cache
def schema_of_file(kind: str) -> dict[str, Any]:
    """What may stand in a kind of config file, or in a run's layout."""
    return schema_of(Layout if kind == "layout" else FILES[kind])


@cache
def options(name: str) -> set[str]:
    """The options of a command."""
    command = group.get_command(click.Context(group), name)
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@cache
def failures() -> dict[str, list[str]]:
    """What the page on failures has rows for; of each, the pieces around its …."""
    return {
        quote: [piece.strip() for piece in quote.split("…")]
        for head in ("message", "words")
        for rows in tables(HOWTO / "when-something-fails.md", head)
        for row in rows
        for quote in re.findall("`(.+?)`", row[0])
    }


def test_the_messages_of_the_page_are_llmpipes() -> None:
    known = [*texts(), *errors()]
    assert len(failures()) > 80
    for quote, pieces in failures().items():
        assert any(holds(text, pieces) for text in known), quote


def test_every_message_fits_a_row_of_the_page() -> None:
    assert all(re.search(r"\w{2}", quote) for quote in failures())  # a row of … alone would fit all
    told = {text for text in errors() if re.search("[a-z]{2}", text)}  # one without words passes another on
    assert len(told) > 500
    unknown = [text for text in sorted(told) if not any(holds(text, pieces) for pieces in failures().values())]
    assert not unknown, "a row of docs/howto/when-something-fails.md is missing"


def holds(text: str, pieces: list[str]) -> bool:
    """Whether a text has all pieces, one after the other."""
    at = 0
    for piece in pieces:
        found = text.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return True


def said(cell: str) -> dict[str, Any]:
    """The `key: value` of a cell."""
    return {key: value for text in re.findall("`(.*?)`", cell) for key, value in yaml.safe_load(text).items()}


def needed(size: str, recipe: Recipe, layout: Layout) -> float:
    """GiB of the fullest pipeline rank."""
    count = recipe.global_batch // (layout.dp * layout.micro_batch)
    return max(estimate(named_size(size), recipe, layout, rank, count).total for rank in range(layout.pp)) / GIB


def check_fit(total: float, number: str, fits: str) -> None:
    assert f"{total:.0f}" == number
    for card, size in CARDS.items():
        assert (total + LIBRARIES <= size) == (card in fits), (total, fits)


def test_what_fits_on_one_gpu_is_what_the_dry_run_says() -> None:
    (rows,) = tables(HOWTO / "llama2-7b-one-gpu.md", "recipe")
    for changes, number, fits in rows:
        values = said(changes)
        layout = Layout(micro_batch=values.pop("micro_batch", 1)).resolved()
        recipe = replace(load(Recipe, REPOSITORY / "config/recipes/llama2.yaml"), **values)
        check_fit(needed("llama2_7b", recipe, layout), number, fits)


def test_what_fits_on_eight_gpus_is_what_the_dry_run_says() -> None:
    (rows,) = tables(HOWTO / "eight-gpus.md", "model")
    for model, changes, number, fits in rows:
        layout = Layout(gpus_per_node=8, **said(changes)).resolved()
        name = "llama2_70b" if "70b" in model else "llama2"
        recipe = load(Recipe, REPOSITORY / f"config/recipes/{name}.yaml")
        check_fit(needed(model.strip("`"), recipe, layout), number, fits)


PAGES = [REPOSITORY / "README.md", *sorted(HOWTO.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```|^    .*?$", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_list() -> None:
    listed = set(re.findall(r"\]\(docs/howto/([\w-]+\.md)\)", (REPOSITORY / "README.md").read_text()))
    assert listed == {page.name for page in HOWTO.glob("*.md")}

"""The config files of a project by name, and what each has to say for the others to fit.

Every path counts from the project's folder, which is the current one. Only the files that are asked for are read, so
that one broken config file does not stop other runs.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from llmpipe.config import Corpus, Model, Project, Run
from llmpipe.errors import UserError, nearest
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe
from llmpipe.yaml_file import build, load

CONFIG = Path("config")


def names(kind: str) -> list[str]:
    """The names that config/KIND/ has files for: models, corpora, recipes, runs."""
    return sorted(path.stem for path in (CONFIG / kind).glob("*.yaml"))


def project(values: dict[str, Any]) -> Project:
    """What config/config.yaml says, read by Snakemake so that its --config counts; each of the runs has a file."""
    path = CONFIG / "config.yaml"
    try:
        found = build(Project, values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name in found.runs:
        _expect("runs", name, path)
    return found


@cache
def model(name: str) -> Model:
    """config/models/NAME.yaml."""
    return load(Model, CONFIG / "models" / f"{name}.yaml")


@cache
def corpus(name: str) -> Corpus:
    """config/corpora/NAME.yaml."""
    return load(Corpus, CONFIG / "corpora" / f"{name}.yaml")


@cache
def run(name: str) -> Run:
    """config/runs/NAME.yaml; the model, recipe and corpora that it names have files."""
    path = CONFIG / "runs" / f"{name}.yaml"
    found = load(Run, path)
    _expect("models", found.model, path)
    _expect("recipes", found.recipe, path)
    for corpus_name in found.corpora:
        _expect("corpora", corpus_name, path)
    return found


def layout(run_name: str) -> Layout:
    """A run's layout, dp filled in."""
    try:
        found = run(run_name).layout.resolved()
        found.check_training()
        return found
    except UserError as error:
        raise UserError(f"{CONFIG / 'runs' / run_name}.yaml: {error}") from error


def corpora(parted: bool, roles: bool) -> list[str]:
    """The corpora that are tokenized in several jobs, or in one, with roles, or without.

    Wrong files are among those of text in one job: they are told when they are asked for.
    """
    return [name for name in names("corpora") if _kind(name) == (parted, roles)]


def _kind(name: str) -> tuple[bool, bool]:
    try:
        found = corpus(name)
        return found.parts > 1, found.has_roles
    except UserError:
        return False, False


def one_of(choices: list[str]) -> str:
    """The pattern for a wildcard that stands for one of some names."""
    return "|".join(map(re.escape, choices)) or "(?!)"


def config_files(run_name: str) -> list[str]:
    """The config files that a run is made of, but the recipe."""
    found = run(run_name)
    named = [("runs", run_name), ("models", found.model), *(("corpora", name) for name in found.corpora)]
    return [str(CONFIG / kind / f"{name}.yaml") for kind, name in named]


def recipe_file(run_name: str) -> str:
    """The path of a run's recipe, which is read once here so that its mistakes are told before any job starts."""
    path = CONFIG / "recipes" / f"{run(run_name).recipe}.yaml"
    load(Recipe, path)
    return str(path)


def _expect(kind: str, name: str, where: Path) -> None:
    if name not in names(kind):
        raise UserError(
            f"{where} names {name!r}, but there is no {CONFIG / kind / name}.yaml: {nearest(name, names(kind))}"
        )

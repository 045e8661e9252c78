"""The files that a project's config names, weights, text and lm-eval's tasks; UserError for what is not there."""

from collections.abc import Callable
from pathlib import Path

import yaml

from llmpipe.config import HUB
from llmpipe.errors import UserError
from llmpipe.families import named_size
from llmpipe.files import matching
from llmpipe.project.configs import CONFIG, corpus, layout, model, recipe_file, run
from llmpipe.project.outputs import fetched


def source(name: str, there: Callable[[str], bool]) -> str:
    """The path of a model's weights, `fetched(name)` for those of a hub; UserError if they are not `there`."""
    path = model(name).source
    if path.startswith(HUB):
        return fetched(name)
    if not there(path):
        raise UserError(
            f"the weights of model {name} are not there: {path} does not exist. Edit `source:` in"
            f" {CONFIG / 'models' / name}.yaml: it takes a directory with Meta's files (consolidated.*.pth,"
            " params.json, tokenizer.model), a Hugging Face directory (config.json, *.safetensors, tokenizer.model) or"
            " hf://ORG/NAME@REV"
        )
    return path


def hub_source(name: str) -> str:
    """The hf:// of a model; UserError if its source is another: then `fetched(name)` is not made."""
    found = model(name).source
    if not found.startswith(HUB):
        raise UserError(f"{CONFIG / 'models' / name}.yaml: nothing is fetched for the source {found}: only for hf://")
    return found


def corpus_files(name: str, there: Callable[[str], bool]) -> list[str]:
    """The paths of a corpus's text, names with * spelled out; UserError for the first that is not `there`."""
    found = []
    for file in corpus(name).files:
        files = [*map(str, matching(Path(file)))] if "*" in file and not there(file) else [file]
        if not files or not there(files[0]):
            raise UserError(
                f"the text of corpus {name} is not there: {file} does not exist. Edit `files:` in"
                f" {CONFIG / 'corpora' / name}.yaml: it takes .jsonl, .json, .txt (also .gz, .zst), .parquet or .arrow"
                " files, or directories of them"
            )
        found += files
    return found


def task_files(run_name: str) -> list[str]:
    """The lm-eval task files of a run, and the local data that they name: changing one evaluates again."""
    found = []
    for task in run(run_name).evaluate:
        if task.endswith(".yaml"):
            found += [task, *_task_data(Path(task))]
    return found


def _task_data(path: Path) -> list[str]:
    """The `dataset_kwargs: data_files:` of an lm-eval task; nothing from one with lm-eval's own YAML tags."""
    if not path.is_file():
        raise UserError(f"{path} is missing: a run's `evaluate:` names it as an lm-eval task file")
    try:
        files = yaml.safe_load(path.read_text()).get("dataset_kwargs", {}).get("data_files", {})
    except yaml.YAMLError:
        return []
    values = files.values() if isinstance(files, dict) else [files]
    return [file for value in values for file in (value if isinstance(value, list) else [value])]


def check_run(name: str, there: Callable[[str], bool]) -> None:
    """Read everything that a run's file leads to; UserError for the first mistake."""
    found, placed = run(name), layout(name)
    source(found.model, there)
    recipe_file(name)
    task_files(name)
    for corpus_name in found.corpora:
        corpus_files(corpus_name, there)
    shape = model(found.model).shape
    try:
        if shape:
            named_size(shape).check_split(placed.tp, placed.stages)
    except UserError as error:
        raise UserError(
            f"{CONFIG / 'runs' / name}.yaml with {CONFIG / 'models' / found.model}.yaml: {error}"
        ) from error

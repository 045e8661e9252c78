"""A project's folder: its config files by name, and what the workflow's rules look up in them.

Every path counts from the project's folder, which is the current one. Only the files that are asked for are read, so
that one broken config file does not stop other runs.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from llmpipe.config import HUB, Corpus, Model, Project, Run
from llmpipe.errors import UserError, nearest
from llmpipe.families import named_size
from llmpipe.files import matching
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe
from llmpipe.yaml_file import build, load

CONFIG = Path("config")
DATASET = (".bin", ".idx", ".manifest.json")
ROLES = (".roles.bin", ".roles.idx")
"""What a corpus of chats, or of tokens with labels, has besides."""


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


def convert_options(name: str) -> str:
    """The options of `llmpipe convert` that a model's file decides."""
    found = model(name)
    options = [f"--shape {found.shape}"] if found.shape else []
    options += [f"--source-dialect {found.dialect}"] if found.dialect else []
    options += [f"--vocab {found.vocab}"] if found.vocab else []
    options += [f"--add-token {quote(token)}" for token in found.added_tokens]
    return " ".join(options + ([f"--new-rows {found.new_rows}"] if found.added_tokens else []))


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


def fetched(name: str) -> str:
    """Where the weights of a model with an hf:// source are fetched to."""
    return f"results/models/{name}/source"


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


def part_prefixes(model_name: str, corpus_name: str) -> list[str]:
    """The datasets that a corpus's jobs make."""
    count = corpus(corpus_name).parts
    prefix = f"results/models/{model_name}/corpora/{corpus_name}"
    return [f"{prefix}.part-{number}-of-{count}" for number in range(1, count + 1)]


def part_files(model_name: str, corpus_name: str) -> list[str]:
    """The files of these datasets."""
    suffixes = _suffixes(corpus_name)
    return [prefix + suffix for prefix in part_prefixes(model_name, corpus_name) for suffix in suffixes]


def _suffixes(corpus_name: str) -> tuple[str, ...]:
    return DATASET + ROLES if corpus(corpus_name).has_roles else DATASET


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


def dataset(run_name: str, corpus_name: str) -> str:
    """The prefix of one of a run's datasets: tokens are made with the run's model's tokenizer."""
    return f"results/models/{run(run_name).model}/corpora/{corpus_name}"


def checkpoint(run_name: str) -> str:
    """The checkpoint that a run starts from."""
    return f"results/models/{run(run_name).model}/checkpoint"


def rank_files(run_name: str) -> str:
    """The rank files of a run's model in the run's layout."""
    return f"results/models/{run(run_name).model}/{layout(run_name).rank_files}"


def stage_options(stages: str) -> str:
    """The options of `llmpipe shard` for what follows `pp` in a directory's name: 2, 2-vp2, 2-layers15.17."""
    found = re.fullmatch(r"(\d+)(?:-vp(\d+))?(?:-layers([\d.]+))?", stages)
    assert found, stages  # the workflow's wildcard_constraints
    pp, vp, layers = found.groups()
    more = (f" --vp {vp}" if vp else "") + (f" --pp-layers {layers.replace('.', ',')}" if layers else "")
    return f"--pp {pp}{more}"


def cards(run_name: str) -> list[str]:
    """The verification cards that a run waits for: the checkpoint's and the rank files'."""
    return [f"results/models/{run(run_name).model}/verify.json", f"{rank_files(run_name)}.verify.json"]


def dataset_files(run_name: str) -> list[str]:
    """The files of a run's datasets."""
    names = run(run_name).corpora
    return [dataset(run_name, name) + suffix for name in names for suffix in _suffixes(name)]


def finetune_options(run_name: str) -> str:
    """The options of `llmpipe finetune` that a run's file decides."""
    found, placed = run(run_name), layout(run_name)
    kinds = {"data": found.data, "validation": found.validation, "test": found.test}
    options = [f"--{kind} {dataset(run_name, name)}={kinds[kind][name]:g}" for kind in kinds for name in kinds[kind]]
    if not found.validation and not found.test:
        options.append(f"--split {','.join(f'{share:g}' for share in found.split)}")
    options += [f"--{key.replace('_', '-')} {getattr(placed, key)}" for key in _LAYOUT_OPTIONS]
    options += [f"--pp-layers {','.join(map(str, placed.pp_layers))}"] if placed.pp_layers else []
    return " ".join(options + [f"--config-file {path}" for path in config_files(run_name)])


def evaluate_options(run_name: str) -> str:
    """The options of `llmpipe evaluate` that a run's file decides: as many GPUs as share each layer, or the CPU."""
    device, tasks = layout(run_name).device, ",".join(run(run_name).evaluate)
    return f"--tasks {tasks} --device {device} --tp {evaluate_gpus(run_name) or 1}"


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


def evaluate_gpus(run_name: str) -> int:
    """GPUs that evaluating a run takes."""
    placed = layout(run_name)
    return placed.tp if placed.device == "cuda" else 0


def tracked_files(name: str, stage: str) -> list[str]:
    """What has to be there before `llmpipe track` mirrors a stage of a run or of a model."""
    run_folder, model_folder = f"results/runs/{name}", f"results/models/{name}"
    return {
        "convert": [f"{model_folder}/checkpoint"],
        "verify": [f"{model_folder}/verify.json"],
        "evaluate": [f"{run_folder}/tracked/finetune.json", f"{run_folder}/evaluate/table.json"],
        "export": [f"{run_folder}/tracked/evaluate.json", f"{run_folder}/export"],
    }[stage]


def track_options(project: Project) -> str:
    """The options of `llmpipe track` that config/config.yaml decides."""
    return f"--uri {quote(project.tracking.uri)} --experiment {quote(project.tracking.experiment)}"


_LAYOUT_OPTIONS = ("nodes", "gpus_per_node", "tp", "pp", "dp", "micro_batch", "device")


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

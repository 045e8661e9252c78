"""The options of each stage's command that the config files decide, and the GPUs that it takes."""

import re
from shlex import quote

from llmpipe.config import Project
from llmpipe.layout import Layout
from llmpipe.project.configs import config_files, layout, model, run
from llmpipe.project.outputs import dataset

_LAYOUT_OPTIONS = ("nodes", "gpus_per_node", "tp", "pp", "dp", "micro_batch", "device")
_SELDOM_OPTIONS = ("cp", "vp", "pp_schedule", "data_parallel")
"""Given only where they are not the default."""


def convert_options(name: str) -> str:
    """The options of `llmpipe convert` that a model's file decides."""
    found = model(name)
    options = [f"--shape {found.shape}"] if found.shape else []
    options += [f"--source-dialect {found.dialect}"] if found.dialect else []
    options += [f"--vocab {found.vocab}"] if found.vocab else []
    options += [f"--add-token {quote(token)}" for token in found.added_tokens]
    return " ".join(options + ([f"--new-rows {found.new_rows}"] if found.added_tokens else []))


def stage_options(stages: str) -> str:
    """The options of `llmpipe shard` for what follows `pp` in a directory's name: 2, 2-vp2, 2-layers15.17."""
    found = re.fullmatch(r"(\d+)(?:-vp(\d+))?(?:-layers([\d.]+))?", stages)
    assert found, stages  # the workflow's wildcard_constraints
    pp, vp, layers = found.groups()
    more = (f" --vp {vp}" if vp else "") + (f" --pp-layers {layers.replace('.', ',')}" if layers else "")
    return f"--pp {pp}{more}"


def finetune_options(run_name: str) -> str:
    """The options of `llmpipe finetune` that a run's file decides."""
    found, placed = run(run_name), layout(run_name)
    kinds = {"data": found.data, "validation": found.validation, "test": found.test}
    options = [f"--{kind} {dataset(run_name, name)}={kinds[kind][name]:g}" for kind in kinds for name in kinds[kind]]
    if not found.validation and not found.test:
        options.append(f"--split {','.join(f'{share:g}' for share in found.split)}")
    seldom = [key for key in _SELDOM_OPTIONS if getattr(placed, key) != getattr(Layout(), key)]
    options += [f"--{key.replace('_', '-')} {getattr(placed, key)}" for key in (*_LAYOUT_OPTIONS, *seldom)]
    options += [f"--pp-layers {','.join(map(str, placed.pp_layers))}"] if placed.pp_layers else []
    return " ".join(options + [f"--config-file {path}" for path in config_files(run_name)])


def evaluate_options(run_name: str) -> str:
    """The options of `llmpipe evaluate` that a run's file decides: as many GPUs as share each layer, or the CPU."""
    device, tasks = layout(run_name).device, ",".join(run(run_name).evaluate)
    return f"--tasks {tasks} --device {device} --tp {evaluate_gpus(run_name) or 1}"


def evaluate_gpus(run_name: str) -> int:
    """GPUs that evaluating a run takes."""
    placed = layout(run_name)
    return placed.tp if placed.device == "cuda" else 0


def evaluate_threads(run_name: str) -> int:
    """CPU threads of it: eight a GPU."""
    return 8 * evaluate_gpus(run_name) or 1


def track_environment(project: Project) -> dict[str, str]:
    """The same in MLflow's own variables, for `llmpipe finetune`: among a rule's params they would train again."""
    return {"MLFLOW_TRACKING_URI": project.tracking.uri, "MLFLOW_EXPERIMENT_NAME": project.tracking.experiment}


def track_options(project: Project) -> str:
    """The options of `llmpipe track` that config/config.yaml decides."""
    return f"--uri {quote(project.tracking.uri)} --experiment {quote(project.tracking.experiment)}"

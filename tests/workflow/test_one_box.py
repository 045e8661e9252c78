"""One machine with eight GPUs, which a fake nvidia-smi names: trainings of one Snakemake never meet on one of them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from snakemake_help import job_counts

from llmpipe.project import outputs

Snakemake = Callable[..., CompletedProcess[str]]
WANTED = {"four": 4, "other_four": 4, "two": 2, "eight": 8}
"""GPUs of each run."""
UUIDS = [f"GPU-{number}" for number in range(8)]
CORES = "128"
"""Of such a box: a training takes eight a GPU, and with the two of this machine one would follow the other."""


@pytest.fixture
def box(project: Path, snakemake: Snakemake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snakemake:
    """Snakemake in a project whose runs have all that they start from."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    programs = tmp_path / "bin"
    (programs / "nvidia-smi").write_text("\n".join(["#!/bin/sh", *(f"echo {uuid}" for uuid in UUIDS)]))
    (programs / "nvidia-smi").chmod(0o755)
    trainer = Path(__file__).with_name("trainer.py").read_text()
    (programs / "llmpipe").write_text(f"#!{sys.executable}\n{trainer}")
    (project / "locks").mkdir()
    monkeypatch.chdir(project)
    for name, count in WANTED.items():
        text = f"{{model: llama2_7b, data: {{text: 1}}, recipe: llama2, layout: {{gpus_per_node: {count}}}}}"
        Path(f"config/runs/{name}.yaml").write_text(text)
        Path(outputs.rank_files(name)).mkdir(parents=True, exist_ok=True)
        for path in [*outputs.cards(name), *outputs.dataset_files(name)]:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
    return snakemake


def trained(names: list[str], gpus: str, box: Snakemake) -> tuple[str, dict[str, dict[str, Any]]]:
    """What Snakemake said, and what each training had."""
    targets = [f"results/runs/{name}/run.json" for name in names]
    done = box("--resources", f"gpu={gpus}", "--cores", CORES, "--allowed-rules", "finetune", "--", *targets)
    assert done.returncode == 0, done.stdout
    assert "other llmpipe processes" not in done.stdout  # Snakemake counts them: none had to wait for another's
    return done.stdout, {name: json.loads(Path(path).read_text()) for name, path in zip(names, targets, strict=True)}


def at_once(told: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Those that had GPUs when each of them began."""
    return [[name for name, one in told.items() if one["from"] <= new["from"] < one["to"]] for new in told.values()]


def test_no_two_trainings_meet_on_a_gpu(box: Snakemake) -> None:
    said, told = trained([*WANTED], "8", box)
    assert job_counts(said) == {"finetune": len(WANTED)}
    assert {name: len(set(one["gpus"])) for name, one in told.items()} == WANTED
    together = at_once(told)
    for names in together:
        taken = [uuid for name in names for uuid in told[name]["gpus"]]
        assert len(set(taken)) == len(taken) <= len(UUIDS), told
        assert set(taken) <= set(UUIDS)
    assert any(len(names) > 1 for names in together), told  # side by side, where there is room


def test_one_that_wants_more_than_snakemake_is_told_of_runs_alone(box: Snakemake) -> None:
    """Snakemake cuts what a job asks for down to what there is; the training takes what it needs all the same."""
    said, told = trained(["eight", "two"], "4", box)
    assert sorted(re.findall(r" gpu=(\d),", said)) == ["2", "4"]
    assert {name: len(set(one["gpus"])) for name, one in told.items()} == {"eight": 8, "two": 2}
    assert all(len(names) == 1 for names in at_once(told)), told

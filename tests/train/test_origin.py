"""Where a training comes from."""

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import make_job

from llmpipe.train.origin import with_origin


def test_attempts_are_of_one_training_until_its_inputs_change(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run")
    first, second = with_origin(job).origin, with_origin(replace(job, recipe=replace(job.recipe, steps=99))).origin
    other = with_origin(replace(job, recipe=replace(job.recipe, lr=2e-3))).origin
    assert first["training"] == second["training"] != other["training"]
    assert first["started_ms"] == second["started_ms"]


def test_commit_and_config(checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    config = tmp_path / "recipe.yaml"
    config.write_text("lr: 1\n")
    job = replace(make_job(checkpoint, dataset, tmp_path / "run"), config_files=["recipe.yaml", "gone.yaml"])
    told = with_origin(job).origin
    assert told["git_commit"] == "" and told["config_digest"] == hashlib.sha256(b"lr: 1\n").hexdigest()

    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "recipe.yaml"], ["commit", "--quiet", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert with_origin(job).origin["git_commit"] == commit
    config.write_text("lr: 2\n")
    assert with_origin(job).origin["git_commit"] == f"{commit}-dirty"

"""Trainings on GPUs by `llmpipe finetune`, in processes of their own; skipped where none is."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_command import LLMPIPE, assert_trained_alike, finetune_arguments

NUM_GPUS = torch.cuda.device_count()
STEPS = 20
needs_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="torch sees no GPU here")
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason="torch does not see two GPUs here")


@pytest.fixture
def checkpoint(wide_checkpoint: Path) -> Path:
    return wide_checkpoint


def train(
    folder: Path, checkpoint: Path, dataset: Path, more: dict[str, Any], *options: str, device: str = "cuda"
) -> tuple[int, list[dict[str, Any]]]:
    """Train with a recipe of `more` keys; exit status and the metrics so far. A second call in a folder goes on."""
    if not (folder / "recipe.yaml").exists():
        folder.mkdir()
        finetune_arguments(checkpoint, dataset, folder)
    keys = {"seq_len": 32, "global_batch": 8, "steps": STEPS, "lr": 1e-3, "precision": "bf16", "save_every": 5} | more
    (folder / "recipe.yaml").write_text(json.dumps(keys))
    done = subprocess.run(
        [
            *LLMPIPE, "finetune", folder / "recipe.yaml", "--model", folder / "checkpoint", "--data", dataset,
            "--output", folder / "run", "--micro-batch", "2", "--device", device, *options,
        ],
        stderr=subprocess.PIPE, text=True, timeout=600,
    )  # fmt: skip
    metrics = folder / "run" / ("live.jsonl" if done.returncode else "metrics.jsonl")
    assert done.returncode in (0, 75), done.stderr
    return done.returncode, [json.loads(line) for line in metrics.read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines])


@needs_gpu
@pytest.mark.parametrize("more", [{}, {"recompute": "selective"}, {"compile": True}, {"precision": "fp16"}], ids=str)
def test_resumes_to_the_bit(more: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """From an asynchronous checkpoint, in deterministic kernels: packed rows of several documents each."""
    keys = more | {"deterministic": True}
    assert train(tmp_path / "whole", checkpoint, dataset, keys)[0] == 0
    assert train(tmp_path / "half", checkpoint, dataset, keys, "--exit-at-step", "7")[0] == 75
    assert train(tmp_path / "half", checkpoint, dataset, keys)[0] == 0
    assert "resumed after step 7" in (tmp_path / "half/run/log.txt").read_text()
    assert_trained_alike(tmp_path / "half/run", tmp_path / "whole/run")


@needs_gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_trains_as_the_cpu(precision: str, tolerance: float, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    _, found = train(tmp_path / "gpu", checkpoint, dataset, {"precision": precision})
    _, expected = train(tmp_path / "cpu", checkpoint, dataset, {"precision": "fp32"}, device="cpu")
    torch.testing.assert_close(losses(found), losses(expected), rtol=tolerance, atol=0)


@needs_two
@pytest.mark.parametrize("layout", ["--dp", "--tp", "--pp", "--cp"])
def test_two_gpus_train_as_one(layout: str, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """Over NCCL."""
    keys = {"precision": "fp32"}
    _, expected = train(tmp_path / "one", checkpoint, dataset, keys)
    _, found = train(tmp_path / "two", checkpoint, dataset, keys, layout, "2", "--gpus-per-node", "2")
    torch.testing.assert_close(losses(found), losses(expected), rtol=1e-3, atol=0)

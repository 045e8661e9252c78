"""One tiny checkpoint for all tests here, and a run that trained nothing."""

import json
from pathlib import Path

import pytest

from llmpipe.checkpoint.convert import shard
from llmpipe.layout import Stages
from tiny_llama import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path) -> Path:
    """A finished run's folder, its weights of four ranks."""
    shard(checkpoint, tmp_path / "run" / "weights", 2, Stages(2))
    record = {
        "name": "my_run", "steps": 7, "tokens": 1234567, "split": [8, 1, 1], "recipe": {"lr": 0.5},
        "data": [{"prefix": "corpora/text", "weight": 1.0, "digest": "abc"}],
        "model": {"path": "models/m/tp2-pp2", "checkpoint_digest": "0123"},
    }  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run"

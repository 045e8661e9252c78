"""A tiny model of each family in the demo's folder: made, converted, verified, its card in the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# tiny_falcon has a run: tests/docs makes it.
MODELS = ("tiny_llama3", "tiny_mistral", "tiny_qwen2", "tiny_qwen3", "tiny_falcon_new")
TARGETS = [f"verify_{name}" for name in MODELS]


def snakemake(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with the cards of all families."""
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("results", "logs", "data", "weights", "mlruns", "mlflow.db", ".*")
    shutil.copytree(ROOT / "demo", root / "demo", ignore=ignored, symlinks=True)
    for name in ("workflow", "slurm"):
        (root / name).symlink_to(ROOT / name)
    snakemake(root / "demo", "-c", "2", *TARGETS)
    return root / "demo"


@pytest.mark.parametrize("name", MODELS)
def test_the_card_of_each_family_says_pass(name: str, demo: Path) -> None:
    card = json.loads((demo / f"results/models/{name}/verify.json").read_text())
    assert card["verdict"] == "pass" and card["first_difference"] is None
    logits = next(check for check in card["checks"] if check["name"] == "largest logit difference")
    assert logits["verdict"] == "pass" and logits["value"] <= 1e-5
    assert (demo / f"results/models/{name}/tracked/verify.json").is_file()


def test_every_card_is_in_the_report(demo: Path) -> None:
    snakemake(demo, "-c", "1", *TARGETS, "--report", "cards.html")
    report = (demo / "cards.html").read_text()
    for name in MODELS:
        assert f"results/models/{name}/verify.html" in report


def test_the_weights_are_made_anew_bit_for_bit(demo: Path) -> None:
    inputs = ["weights/tiny_llama", "data/tiny_llama.jsonl"]
    subprocess.run([sys.executable, "make_hf_weights.py", "tiny_qwen2", *inputs, "again"], cwd=demo, check=True)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (demo / "again" / name).read_bytes() == (demo / "weights/tiny_qwen2" / name).read_bytes()

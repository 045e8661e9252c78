"""`source: hf://…` of a model's file: fetched by a rule of its own, on the submitting machine, when it has to be."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from snakemake_help import commands, job_counts
from transformers import LlamaConfig, LlamaForCausalLM

from hub_server import COMMIT, Hub, files_of, serving
from llmpipe.checkpoint import manifest

ROOT = Path(__file__).parents[2]
Snakemake = Callable[..., CompletedProcess[str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a tiny Llama, which every process of the test asks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "published")
    with serving(Hub(files_of(tmp_path / "published"))) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def model(hub: Hub, project: Path) -> Path:
    """config/models/tiny.yaml."""
    path = project / "config/models/tiny.yaml"
    path.write_text("source: hf://org/tiny@v1.0")
    return path


def test_a_dry_run_asks_nobody(hub: Hub, model: Path, snakemake: Snakemake) -> None:
    done = snakemake("--profile", "slurm", "-n", "-p", "verify_tiny")
    assert done.returncode == 0, done.stdout
    assert job_counts(done.stdout) == dict.fromkeys(["download", "convert", "verify", "track", "verify_tiny"], 1)
    fetch, convert, verify, _ = commands(done.stdout)
    source = "results/models/tiny/source"
    assert fetch == f"llmpipe download hf://org/tiny@v1.0 --output {source} --log logs/download/tiny.log"
    assert convert.startswith(f"llmpipe convert {source} ") and f" --reference {source} " in verify
    assert not hub.asked


def test_compute_nodes_fetch_nothing() -> None:
    rule = re.split(r"(?m)^rule ", (ROOT / "workflow/rules/checkpoint.smk").read_text())[1]
    assert rule.startswith("download:") and "    localrule: True\n" in rule


def test_another_revision_is_fetched_and_the_same_is_not(model: Path, snakemake: Snakemake) -> None:
    assert snakemake("-c", "1", "verify_tiny").returncode == 0
    assert "Nothing to be done" in snakemake("-n", "verify_tiny").stdout
    model.write_text("source: hf://org/tiny@v2.0\n")
    assert job_counts(snakemake("-n", "verify_tiny").stdout)["download"] == 1


def test_a_name_that_is_none_is_told(model: Path, snakemake: Snakemake) -> None:
    model.write_text("source: hf://tiny")
    done = snakemake("-n", "convert_tiny")
    assert done.returncode == 1
    assert "config/models/tiny.yaml: hf://tiny names no repository of the Hugging Face hub: hf://ORG/" in done.stdout


def test_other_sources_are_not_fetched(snakemake: Snakemake) -> None:
    done = snakemake("-n", "results/models/llama2_7b/source")
    assert done.returncode == 1
    assert "config/models/llama2_7b.yaml: nothing is fetched for the source weights/llama-2-7b: only for" in done.stdout


def test_a_checkpoint_from_the_hub(model: Path, project: Path, tmp_path: Path) -> None:
    """The commands themselves, no stub."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-c", "1", "results/models/tiny/checkpoint"],
        cwd=project, env=os.environ | {"PATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    source, made = (manifest.check(project / "results/models/tiny" / name) for name in ("source", "checkpoint"))
    assert source.source == {"path": "hf://org/tiny", "revision": "v1.0", "commit": COMMIT}
    assert made.source["digest"] == source.digest
    assert LlamaForCausalLM.from_pretrained(project / "results/models/tiny/checkpoint").num_parameters()

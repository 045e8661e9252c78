"""Run and model folders, written by hand."""

import json
from dataclasses import asdict
from pathlib import Path

from llmpipe.checkpoint import manifest
from llmpipe.layout import Layout
from llmpipe.recipe import Recipe

START = 1_767_225_600  # 2026-01-01, in seconds
ORIGIN = {
    "training": "0123456789abcdef", "started_ms": str(1000 * START), "git_commit": "c0ffee", "config_digest": "cfg",
    "command": "llmpipe finetune recipe.yaml", "host": "node7", "user": "ada",
}  # fmt: skip


def step_line(step: int, loss: float | None = None) -> dict:
    """A step's line, of a step a second."""
    loss = 5 / step if loss is None else loss
    return {"step": step, "loss": loss, "lr": 1e-3, "skipped": None, "skipped_steps": 0, "time": START + step}


def lines_of(steps: int, first: int = 1) -> str:
    return "".join(json.dumps(step_line(step)) + "\n" for step in range(first, steps + 1))


def make_live(folder: Path, steps: int = 3, origin: dict = ORIGIN) -> Path:
    """A run that is training: what the launcher and the ranks have written by now."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "recipe": asdict(Recipe(seq_len=32, global_batch=8, steps=300, lr=0.001)), "layout": asdict(Layout()),
        "model": "results/models/m/tp2-pp2", "data": {"corpora/c": 1.0}, "split": [969, 30, 1], "output": str(folder),
        "origin": origin,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    (folder / "live.jsonl").write_text(lines_of(steps))
    return folder


def make_run(folder: Path, weights: bytes = b"weights", steps: int = 3, **changes: object) -> Path:
    """A finished and evaluated run of a few steps."""
    for name in ("weights", "system"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "weights" / "tp0-pp0.safetensors").write_bytes(weights)
    manifest.write(folder / "weights", "weights", {})
    (folder / "metrics.jsonl").write_text(lines_of(steps))
    busy = [{"time": START + 10 * n, "cpu_utilization_percentage": 90.0 + n} for n in range(2)]
    (folder / "system" / "node7.jsonl").write_text("".join(json.dumps(line) + "\n" for line in busy))
    configs = [folder.parent / "config" / kind / "same.yaml" for kind in ("recipes", "runs")]
    for path in configs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("lr: 0.001\n")
    record = {
        "name": folder.name, "exit_reason": "finished", "llmpipe": "0.1.0", "torch": "2.13",
        "recipe": {"lr": 0.001, "betas": [0.9, 0.95], "schedule": {"kind": "cosine"}},
        "layout": {"nodes": 1, "gpus_per_node": 2, "tp": 2, "device": "cpu"},
        "split": [969, 30, 1], "data": [{"prefix": "corpora/c", "weight": 1.0, "digest": "dd"}],
        "model": {"path": "results/models/m/tp2-pp2", "checkpoint_digest": "cd"}, "shape": {"hidden": 32},
        "steps": steps, "tokens": 32 * steps, "seconds": 2.0 * steps, "config_files": [*map(str, configs), "gone.yaml"],
        "origin": ORIGIN,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record | changes))
    make_table(folder)
    return folder


def make_table(folder: Path) -> None:
    """A run's evaluation."""
    (folder / "evaluate").mkdir(exist_ok=True)
    row = {"task": "perplexity", "metric": "perplexity", "before": 10.0, "after": 8.0, "stderr": None, "n": 3}
    (folder / "evaluate" / "table.json").write_text(json.dumps({"rows": [row]}))
    (folder / "evaluate" / "table.md").write_text(
        "| metric | before | after |\n|---|---|---|\n| perplexity | 10 | 8 |\n"
    )


def make_export(folder: Path) -> Path:
    """A run's export."""
    export = folder / "export"
    export.mkdir()
    (export / "README.md").write_text("# a model\n")
    (export / "check.json").write_text("{}")
    (export / "model.safetensors").write_bytes(b"weights")
    manifest.write(export, "export", {"format": "hf"})
    return export


def make_model(folder: Path) -> Path:
    """A verified checkpoint, its rank files, and a corpus tokenized for it."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.json").write_text(json.dumps({"hidden_size": 32}))
    manifest.write(folder / "checkpoint", "checkpoint", {"path": "weights/m"})
    card = {"verdict": "pass", "checks": [{"name": "max_logit", "value": 1e-6}, {"name": "skipped", "value": None}]}
    (folder / "verify.json").write_text(json.dumps(card))
    (folder / "verify.md").write_text("# Verification\n")
    (folder / "tp2-pp2").mkdir()
    (folder / "tp2-pp2" / "tp0-pp0.safetensors").write_bytes(b"rank")
    manifest.write(folder / "tp2-pp2", "rank_files", {"tp": 2, "pp": 2})
    (folder / "tp2-pp2.verify.json").write_text(json.dumps({"checks": [{"name": "bytes", "value": 0}]}))
    return folder


def make_corpus(prefix: Path) -> Path:
    """What tokenize leaves beside a dataset's files."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    facts = {"documents": 3, "tokens": 90, "bos": True, "tokenizer": {"path": "t", "vocab_size": 32}, "files": {}}
    (prefix.parent / f"{prefix.name}.manifest.json").write_text(json.dumps(facts))
    return prefix

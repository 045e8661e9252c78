"""Run and model folders, written by hand."""

import json
from pathlib import Path

from llmpipe.checkpoint import manifest


def make_run(folder: Path, weights: bytes = b"weights", steps: int = 3, **changes: object) -> Path:
    """A finished and evaluated run of a few steps."""
    for name in ("weights", "evaluate"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "weights" / "tp0-pp0.safetensors").write_bytes(weights)
    manifest.write(folder / "weights", "weights", {})
    lines = [{"step": i, "loss": 5 / i, "lr": 1e-3, "mfu": None, "seconds": 2.0} for i in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    configs = [folder.parent / "config" / kind / "same.yaml" for kind in ("recipes", "runs")]
    for path in configs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("lr: 0.001\n")
    record = {
        "name": folder.name, "exit_reason": "finished", "llmpipe": "0.1.0", "torch": "2.13",
        "recipe": {"lr": 0.001, "betas": [0.9, 0.95], "schedule": {"kind": "cosine"}}, "layout": {"tp": 2},
        "split": [969, 30, 1], "data": [{"prefix": "corpora/c", "weight": 1.0, "digest": "dd"}],
        "model": {"path": "results/models/m/tp2-pp2", "checkpoint_digest": "cd"}, "shape": {"hidden": 32},
        "steps": steps, "tokens": 32 * steps, "seconds": 2.0 * steps, "config_files": [*map(str, configs), "gone.yaml"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record | changes))
    row = {"task": "perplexity", "metric": "perplexity", "before": 10.0, "after": 8.0, "stderr": None, "n": 3}
    (folder / "evaluate" / "table.json").write_text(json.dumps({"rows": [row]}))
    return folder


def make_model(folder: Path) -> Path:
    """A verified checkpoint."""
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.json").write_text(json.dumps({"hidden_size": 32}))
    manifest.write(folder / "checkpoint", "checkpoint", {"path": "weights/m"})
    card = {"verdict": "pass", "checks": [{"name": "max_logit", "value": 1e-6}, {"name": "skipped", "value": None}]}
    (folder / "verify.json").write_text(json.dumps(card))
    (folder / "verify.md").write_text("# Verification\n")
    (folder / "tp2-pp2.verify.json").write_text(json.dumps({"checks": [{"name": "bytes", "value": 0}]}))
    return folder

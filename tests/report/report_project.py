"""A project's folder with a model, datasets and runs, written by hand and by the library's own writers."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from llmpipe.checkpoint import manifest
from llmpipe.data.dataset import manifest as dataset_manifest
from llmpipe.data.dataset.indexed import Writer
from llmpipe.data.dataset.roles import ASSISTANT, USER

CHAT = [USER, USER, ASSISTANT, ASSISTANT, ASSISTANT]
STEPS = 20
SHAPE = {
    "family": "llama", "num_layers": 2, "hidden": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "ffn": 16,
    "vocab": 50, "max_positions": 64, "norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def make_model(project: Path) -> Path:
    """results/models/m: checkpoint and rank files, each with its card; returns the rank files."""
    model = project / "results/models/m"
    for name in ("checkpoint", "tp2-pp1"):
        (model / name).mkdir(parents=True)
        (model / name / "model.safetensors").write_bytes(name.encode())
    source = {
        "path": "weights/m",
        "format": "meta",
        "files": {"consolidated.00.pth": "a" * 64, "params.json": "b" * 64},
    }
    checkpoint = manifest.write(model / "checkpoint", "checkpoint", source)
    manifest.write(model / "tp2-pp1", "rank_files", {"path": "…", "checkpoint": checkpoint.digest})
    for name, subject in (("verify", "checkpoint"), ("tp2-pp1.verify", "tp2-pp1")):
        check = {"name": f"logits of {subject}", "value": 1e-7, "limit": 1e-4, "verdict": "pass", "detail": "a < b"}
        skipped = {"name": "processes", "value": None, "limit": None, "verdict": "not run", "detail": "no room"}
        card = {
            "verdict": "pass", "subject": {"path": subject, "digest": "d"}, "reference": {"path": "weights/m"},
            "checks": [check, skipped], "first_difference": None, "llmpipe": "0.1.0",
        }  # fmt: skip
        (model / f"{name}.json").write_text(json.dumps(card))
    return model / "tp2-pp1"


def make_texts(prefix: Path, lengths: list[int]) -> None:
    """A dataset of texts of these lengths, with its manifest."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.arange(sum(lengths)) % 50, np.array(lengths))
    _write_manifest(prefix, "text")


def make_chats(prefix: Path, roles: list[list[int]]) -> None:
    """A dataset of chats with these roles of their tokens."""
    make_texts(prefix, [len(one) for one in roles])
    with Writer(prefix.with_name(f"{prefix.name}.roles"), np.dtype(np.uint8)) as writer:
        writer.add(np.concatenate([np.array(one) for one in roles]), np.array([len(one) for one in roles]))
    _write_manifest(prefix, "chat")


def _write_manifest(prefix: Path, kind: str) -> None:
    tokenizer = {"path": "results/models/m/checkpoint/tokenizer.model", "sha256": "c" * 64, "vocab_size": 50}
    sources = [{"path": "data/corpus.jsonl", "bytes": 1234, "sha256": "e" * 64}]
    dataset_manifest.write(prefix, {"corpus_kind": kind, "tokenizer": tokenizer, "sources": sources})


def make_run(project: Path, name: str, finished: bool = True, **recipe: Any) -> Path:
    """A trained run of `make_model`'s rank files, on results/models/m/corpora/c."""
    run, ranks, prefix = (
        project / f"results/{path}" for path in (f"runs/{name}", "models/m/tp2-pp1", "models/m/corpora/c")
    )
    if not ranks.exists():
        make_model(project)
        make_chats(prefix, [CHAT] * 8)
    (run / "weights").mkdir(parents=True)
    told = {
        "recipe": {"seq_len": 8, "global_batch": 4, "steps": STEPS, "lr": 0.001, "seed": 1, **recipe},
        "layout": {"nodes": 1, "gpus_per_node": 2, "tp": 2, "pp": 1, "cp": 1, "dp": 1, "device": "cpu"},
        "split": [1.0, 0.0, 0.0],
    }  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in _lines(told["recipe"]["lr"]))
    if not finished:
        inputs = {"model": "results/models/m/tp2-pp1", "data": {"results/models/m/corpora/c": 1.0}}
        job = told | inputs | {"output": str(run)}
        (run / "job.json").write_text(json.dumps(job))
        (run / "live.jsonl").write_text(lines + '{"step": 21, "lo')  # which is being written
        return run
    (run / "metrics.jsonl").write_text(lines)
    (run / "weights/tp0-pp0.safetensors").write_bytes(name.encode())
    digest = manifest.write(run / "weights", "weights", {}).digest
    record = told | {
        "name": name, "exit_reason": "finished", "shape": SHAPE, "steps": STEPS, "tokens": 640, "seconds": 75.0,
        "model": {"path": "results/models/m/tp2-pp1", "checkpoint_digest": manifest.read(ranks).source["checkpoint"]},
        "data": [{"prefix": "results/models/m/corpora/c", "weight": 1.0, "digest": dataset_manifest.digest(prefix)}],
        "weights_digest": digest, "llmpipe": "0.1.0", "torch": "2.13.0",
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    return run


def _lines(lr: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "loss": None if step == 7 else 4 / step, "lr": lr, "grad_norm": 1.0 + step, "loss_scale": 1.0,
            "skipped": "its loss is no number" if step == 7 else None, "skipped_steps": int(step >= 7),
            "tokens": 32 * step, "epoch": step / 8, "tokens_per_second": 100.0 * step, "memory_bytes": 3 << 29,
            "seconds": 0.5,
        }
        for step in range(1, STEPS + 1)
    ]  # fmt: skip


def evaluate(run: Path, after: float = 8.0) -> None:
    """The run's table."""
    rows = [
        {"task": "perplexity", "metric": "perplexity", "before": 10.0, "after": after, "difference": after - 10,
         "percent": 10 * (after - 10), "stderr": None, "n": 3},
        {"task": "<piqa>", "metric": "acc", "before": 0.5, "after": 0.25, "difference": -0.25, "percent": -50.0,
         "stderr": 0.01, "n": 80},
    ]  # fmt: skip
    (run / "evaluate").mkdir()
    (run / "evaluate/table.json").write_text(json.dumps({"rows": rows}))


def export(run: Path) -> None:
    """The run's export."""
    (run / "export").mkdir()
    (run / "export/model.safetensors").write_bytes(b"exported")
    (run / "export/check.json").write_text(json.dumps({"checks": []}))
    source = {"path": str(run / "weights"), "digest": manifest.read(run / "weights").digest, "format": {"to": "hf"}}
    manifest.write(run / "export", "export", source)


def make_full_run(project: Path, name: str, seed: int = 0, **recipe: Any) -> Path:
    """A run of 300 steps as a cluster leaves it: evaluated, exported, resumed, logged, and its numbers are noisy."""
    run = make_run(project, name, steps=300, seq_len=64, eval_every=25, precision="fp16", **recipe)
    models, logs, draw = project / "results/models/m", project / "logs", random.Random(seed)
    held_out = models / "corpora/held_out"
    if not held_out.with_name("held_out.idx").exists():
        lengths = random.Random(0)
        make_chats(models / "corpora/c", [[USER] * 3 + [ASSISTANT] * lengths.randint(2, 55) for _ in range(400)])
        make_texts(held_out, [int(lengths.lognormvariate(4, 1)) + 2 for _ in range(60)])
    record = json.loads((run / "run.json").read_text())
    for key, prefix in (("data", models / "corpora/c"), ("validation", held_out)):
        told = f"results/models/m/corpora/{prefix.name}"
        record[key] = [{"prefix": told, "weight": 1.0, "digest": dataset_manifest.digest(prefix)}]
    record |= {
        "steps": 300, "seconds": 5400.0, "layout": record["layout"] | {"gpus_per_node": 8, "dp": 4, "device": "cuda"},
        "origin": {"command": f"llmpipe finetune config/recipes/{name}.yaml", "host": "node7"},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    lines = [_full_line(step, record["recipe"]["lr"], 120 + 40 * seed, draw) for step in range(1, 301)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "log.txt").write_text("INFO resumed after step 100 from checkpoints/a\n")
    evaluate(run, after=8.0 + seed)
    export(run)
    _make_logs(logs, name)
    return run


def _full_line(step: int, lr: float, overflow: int, draw: random.Random) -> dict[str, Any]:
    """A step's line with every number that there is; that of the overflow is skipped, and some are evaluated."""

    def near(value: float, share: float) -> float:
        return value * (1 + draw.uniform(-share, share))

    skipped, warm = step == overflow, min(1.0, step / 20)
    loss = near(2 + 6 * math.exp(-step * lr * 20), 0.04)
    line = {
        "step": step, "loss": None if skipped else loss, "perplexity": math.exp(loss), "accuracy": near(1 / loss, 0.05),
        "assistant_accuracy": near(1.2 / loss, 0.05), "lr": lr * warm * (1 + math.cos(math.pi * step / 300)) / 2,
        "grad_norm": None if skipped else near(3 / step**0.3, 0.3), "loss_scale": 32768.0 * (1 + (step < overflow)),
        "skipped": "its gradients overflow fp16" if skipped else None, "skipped_steps": int(step >= overflow),
        "tokens": 2048 * step, "epoch": step / 150, "tokens_per_second": near(31000 * warm**0.2, 0.05),
        "tokens_per_second_per_gpu": 3875.0, "mfu_full": near(0.44, 0.03), "mfu_causal": near(0.41, 0.03),
        "memory_bytes": int((50 + 2 * warm + 1000 * lr) * (1 << 30)), "seconds": 0.07,
    }  # fmt: skip
    held_out = {"eval_loss": loss * 1.05, "eval_perplexity": math.exp(loss * 1.05), "eval_accuracy": 0.9 / loss}
    return line | (held_out | {"eval_seconds": 0.5} if step % 25 == 0 else {})


def _make_logs(logs: Path, name: str) -> None:
    """What the workflow's rules log of each stage, and what Snakemake measured."""
    ranks = "results/models/m/tp2-pp1"
    commands = {
        "convert/m": "weights/m --output results/models/m/checkpoint",
        "verify/m": "results/models/m/checkpoint --reference weights/m --output results/models/m/verify.json",
        "tokenize/m.c": "config/corpora/c.yaml --output results/models/m/corpora/c",
        "tokenize/m.held_out": "config/corpora/held_out.yaml --output results/models/m/corpora/held_out",
        "shard/m.tp2-pp1": f"results/models/m/checkpoint --tp 2 --pp 1 --output {ranks}",
        "verify/m.tp2-pp1": f"{ranks} --reference results/models/m/checkpoint --output {ranks}.verify.json",
        f"finetune/{name}": f"config/recipes/{name}.yaml --model {ranks} --output results/runs/{name}"
        " --data results/models/m/corpora/c=1 --validation results/models/m/corpora/held_out=1 --nodes 1"
        " --gpus-per-node 8 --tp 2 --pp 1 --dp 4 --micro-batch 8 --device cuda",
        f"evaluate/{name}": f"results/runs/{name} --tasks perplexity,piqa --output results/runs/{name}/evaluate",
        f"export/{name}": f"results/runs/{name} --output results/runs/{name}/export",
    }
    for number, (path, arguments) in enumerate(commands.items(), 1):
        log = logs / f"{path}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"2026-01-01 00:00:00 INFO $ llmpipe {log.parent.name} {arguments} --log logs/{path}.log\n")
        (logs / f"{path}.benchmark.tsv").write_text(f"s\th:m:s\tmax_rss\n{37.5 * number}\t-\t{900.0 * number}\n")

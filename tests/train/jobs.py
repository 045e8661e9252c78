"""Trainings of tiny models in a few processes, and what transformers makes of the same batches."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpipe.data.batches.loader import Loader
from llmpipe.data.batches.sampling import Blend
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.job import Job
from llmpipe.train.loop import train

RECIPE = Recipe(
    seq_len=32,
    global_batch=8,
    steps=20,
    lr=3e-3,
    schedule=Schedule(warmup=4, min_lr=1e-4),
    precision="fp32",
    save_every=50,
)

ZERO_BUBBLE = pytest.mark.skipif(torch.__version__ < "2.13", reason="zero-bubble is refused on this torch")


def make_job(checkpoint: Path, dataset: Path, run: Path, recipe: Recipe = RECIPE, **layout: Any) -> Job:
    """A job of the checkpoint on the dataset, in a layout of `layout`'s fields on the CPU."""
    made = Layout(device="cpu", **({"micro_batch": 2} | layout))
    processes = made.tp * made.pp * made.cp * max(made.dp, 1)
    made = replace(made, gpus_per_node=processes // made.nodes).resolved()
    run.mkdir(parents=True, exist_ok=True)
    return Job(
        recipe=recipe, layout=made, model=str(checkpoint), data={str(dataset): 1.0}, split=[90, 5, 5], output=str(run)
    )


def run_job(job: Job) -> list[dict]:
    """Train the job in its processes; returns the lines of its metrics."""
    run_ranks(train, job.layout.processes, job)
    name = "metrics.jsonl" if (job.run / "run.json").exists() else "live.jsonl"
    return [json.loads(line) for line in (job.run / name).read_text().splitlines()]


def losses(lines: list[dict]) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


def trained_by_transformers(
    checkpoint: Path,
    data: Path | dict[Path, float],
    lines: list[dict],
    sizes: list[int] | None = None,
    decays: list[float] | None = None,
    undecayed: str = "1-D",
) -> tuple[PreTrainedModel, torch.Tensor]:
    """transformers' model after as many steps on the same batches at the same rates, and its losses.

    Steps take 8 samples, or `sizes`, and decay by 0.1, or `decays`, what is no vector and not called `undecayed`.
    """
    sizes, decays = sizes or [8] * len(lines), decays or [0.1] * len(lines)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and undecayed not in name]
    plain = [p for name, p in model.named_parameters() if p.ndim == 1 or undecayed in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    weights = data if isinstance(data, dict) else {data: 1.0}
    blend = Blend(weights, [90, 5, 5], "train", 32, sum(sizes), RECIPE.seed)
    expected = []
    for step, (line, size) in enumerate(zip(lines, sizes, strict=True)):
        if line["skipped"]:
            expected.append(math.nan)
            continue
        samples = range(sum(sizes[:step]), sum(sizes[: step + 1]))
        batch = Loader(blend, 32, size, size, dp=1, dp_rank=0, samples_of=lambda _, found=samples: found).step(0)
        loss = sum_over_documents(model, batch) / batch.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["weight_decay"] = decays[step]
        for parameters in optimizer.param_groups:
            parameters["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    return model, torch.tensor(expected, dtype=torch.float64)


def sum_over_documents(model: PreTrainedModel, batch) -> torch.Tensor:
    """Σ w·ℓ with each document alone in a forward pass of transformers: nothing to isolate."""
    total = torch.zeros(())
    bounds = sorted(set(batch.cu_seqlens.flatten().tolist()))
    tokens, labels, weights = batch.tokens.flatten(), batch.labels.flatten(), batch.weights.flatten()
    for start, end in pairwise(bounds):
        logits = model(tokens[None, start:end]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, labels[start:end], reduction="none")
        total = total + (loss * weights[start:end]).sum()
    return total


def train_until_10(job: Job) -> None:
    """Ask to stop as the tenth step ends, whose line follows, as an operator would."""
    from llmpipe.train import loop

    original = loop.asked_to_stop

    def ask(run: Path) -> bool:
        if len((run / "live.jsonl").read_text().splitlines()) == 9:
            (run / "stop").touch()
        return original(run)

    loop.asked_to_stop = ask
    assert train(job) is False


def assert_same_weights(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names and names == sorted(path.name for path in second.glob("*.safetensors"))
    for name in names:
        with safe_open(first / name, "pt") as a, safe_open(second / name, "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            for key in a.keys():  # noqa: SIM118
                assert torch.equal(a.get_tensor(key), b.get_tensor(key)), (name, key)

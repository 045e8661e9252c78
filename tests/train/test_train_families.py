"""Training of every family's parts: in every layout as in one process, and as transformers with torch's AdamW."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10, trained_by_transformers
from safetensors import safe_open

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from llmpipe.checkpoint import manifest
from llmpipe.data.batches.batch import Batch
from llmpipe.layout import Layout
from llmpipe.model.load import fill
from llmpipe.model.rank import RankModel
from llmpipe.parallel.data import distribute
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.pipeline import Pipeline
from llmpipe.parallel.processes import run_ranks
from llmpipe.train.loop import global_loss, global_weight
from llmpipe.train.optimizer import Optimizer
from llmpipe.train.preflight import preflight

NUM_MICRO_BATCHES, NUM_TOKENS, NUM_STEPS = 4, 32, 2
KV_COPIES = ["llama, attention bias", "qwen3, biases", "falcon, 4 heads"]
SPLIT = ["llama, biases", "qwen2", "qwen3", "falcon 40b", *KV_COPIES]
WHOLE = ["llama, mlp bias", "llama, dynamic", "llama, yarn", "mistral, window", "qwen2, windows from layer 1"]
LAYOUTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "tp2": (SPLIT, {"tp": 2}),
    "tp4, more ranks than KV heads": (KV_COPIES, {"tp": 4}),
    "dp2": (SPLIT + WHOLE, {"dp": 2}),
    "pp2, uneven": (SPLIT + WHOLE, {"pp": 2, "pp_layers": [1, 2]}),
    "pp2-dp2, uneven, plain": (["qwen2"], {"pp": 2, "dp": 2, "pp_layers": [1, 2], "data_parallel": "plain"}),
    "pp3": (["qwen2", "falcon, 4 heads"], {"pp": 3}),
    "tp2-pp2-dp2, uneven": (["qwen2", "qwen3, biases", "falcon 40b"], {"tp": 2, "pp": 2, "dp": 2, "pp_layers": [2, 1]}),
}


def batch_of(step: int, dp: int, dp_rank: int) -> Batch:
    """A dp rank's share of a step's global batch: packed documents, some tokens untrained."""
    generator = torch.Generator().manual_seed(step)
    tokens, labels = torch.randint(VOCAB, (2, NUM_MICRO_BATCHES, 1, NUM_TOKENS), generator=generator)
    weights = (torch.rand(NUM_MICRO_BATCHES, 1, NUM_TOKENS, generator=generator) > 0.2).float()
    bounds = torch.tensor([[0, 3 + i, 20 + i, 32, 32] for i in range(NUM_MICRO_BATCHES)], dtype=torch.int32)
    own = slice(dp_rank * NUM_MICRO_BATCHES // dp, (dp_rank + 1) * NUM_MICRO_BATCHES // dp)
    lengths = (NUM_TOKENS,) * (own.stop - own.start)
    assistant = torch.zeros_like(tokens, dtype=torch.bool)
    return Batch(tokens[own], labels[own], weights[own], assistant[own], bounds[own], lengths)


def train_all(names: list[str], layout: Layout) -> dict[str, list[float]]:
    """One rank of every model's training: each step's loss and gradient norm."""
    groups = make_groups(layout, torch.device("cpu"))
    return {name: [number for step in steps(name, layout, groups) for number in step] for name in names}


def steps(name: str, layout: Layout, groups):
    """A training by the engine's own parts, from transformers' weights."""
    reference = theirs(name)
    shape = shape_of(reference)
    weights = in_our_names(reference.state_dict(), shape)
    source = SimpleNamespace(shape=shape, read=lambda key, slices: weights[key][slices])
    with torch.device("meta"):
        model = RankModel(shape, groups.tp, layout.stages, groups.at.pp)
    for stage in model:
        distribute(stage, groups, torch.float32, torch.float32)
    optimizer = Optimizer(model, shape, replace(RECIPE, clip=0.5), groups)
    fill(optimizer.parameters, source, groups.tp, layout.shards, groups.shard_rank)
    pipeline = Pipeline(model, groups, NUM_TOKENS, shape.hidden, torch.float32)
    for step in range(NUM_STEPS):
        batch = batch_of(step, layout.dp, groups.at.dp)
        share = pipeline.forward_backward(batch, global_weight(batch.weights, groups))
        yield global_loss(share, groups, timedelta(minutes=10)), optimizer.reduce_and_clip()
        optimizer.step(1e-2, 0.1)


def in_layout(names: list[str], **layout: Any) -> list[dict[str, list[float]]]:
    made = Layout(device="cpu", **layout)
    made = replace(made, gpus_per_node=made.tp * made.pp * max(made.dp, 1)).resolved()
    return run_ranks(train_all, made.processes, names, made)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    return in_layout(SPLIT + WHOLE)[0]


@pytest.mark.parametrize(("names", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_family_trains_in_every_layout_as_in_one_process(names, layout, alone) -> None:
    for rank in in_layout(names, **layout):
        for name, numbers in rank.items():
            assert numbers == pytest.approx(alone[name], rel=1e-5), name


def checkpoint_of(name: str, folder: Path) -> Path:
    """transformers' own checkpoint of a twin."""
    theirs(name, vocab_size=203).save_pretrained(folder)
    manifest.write(folder, "checkpoint", {})
    return folder


@pytest.mark.parametrize(
    ("name", "num_steps", "layout"),
    [
        ("falcon 7b", 20, {}),
        ("mistral, window", 20, {}),
        ("qwen3", 20, {}),
        ("falcon, 4 heads", 5, {"dp": 2}),
        ("qwen2", 5, {"pp": 2, "pp_layers": [1, 2], "dp": 2}),
        ("llama, heads wider than hidden", 5, {"tp": 2, "pp": 2, "pp_layers": [2, 1]}),
    ],
)
def test_trains_as_transformers_with_torch_adamw(name, num_steps, layout, dataset, tmp_path) -> None:
    checkpoint = checkpoint_of(name, tmp_path / "model")
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(RECIPE, steps=num_steps), **layout)
    preflight(job)
    lines = run_job(job)
    model, expected = trained_by_transformers(checkpoint, dataset, lines)
    torch.testing.assert_close(losses(lines), expected, rtol=1e-5, atol=0)
    shape = shape_of(model)
    assert_published(job.run / "weights", in_our_names(model.state_dict(), shape), job.layout)


def assert_published(weights: Path, expected: dict[str, torch.Tensor], layout: Layout) -> None:
    """Each rank's file holds its layers, the first and the last both a tied embedding; values as transformers'."""
    held = {}
    for pp in range(layout.pp):
        with safe_open(weights / f"tp0-pp{pp}.safetensors", "pt") as file:
            held[pp] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        numbers = {int(key.split(".")[1]) for key in held[pp] if key.startswith("layers.")}
        assert sorted(numbers) == layout.stages.layers_of(3, pp)
    for tensors in held.values():
        for key, tensor in tensors.items():
            part = expected[key][tuple(slice(size) for size in tensor.shape)]
            torch.testing.assert_close(tensor, part, rtol=1e-3, atol=2e-5)
    if "head.weight" not in expected:
        assert torch.equal(held[0]["embedding.weight"], held[layout.pp - 1]["embedding.weight"])


def test_tied_copies_resume_bit_identical(dataset, tmp_path) -> None:
    checkpoint = checkpoint_of("qwen2", tmp_path / "model")
    recipe = replace(RECIPE, steps=12, save_every=10)
    layout = {"pp": 2, "pp_layers": [2, 1]}
    whole = make_job(checkpoint, dataset, tmp_path / "whole", recipe, **layout)
    half = make_job(checkpoint, dataset, tmp_path / "half", recipe, **layout)
    run_job(whole)
    run_ranks(train_until_10, half.layout.processes, half)
    (half.run / "stop").unlink()
    run_job(half)
    assert_same_weights(whole.run / "weights", half.run / "weights")

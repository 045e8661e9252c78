"""The memory estimate against transformers' parameter counts and against what autograd really keeps."""

import gc
import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from jobs import RECIPE, make_job
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llmpipe.checkpoint.formats import open_source
from llmpipe.families import Shape, from_hf_config, named_size
from llmpipe.layout import Layout
from llmpipe.model.layer import Layer
from llmpipe.model.packed import Packed
from llmpipe.model.rope import rope_table
from llmpipe.parallel.data import before_micro_batch, local
from llmpipe.parallel.groups import ContextParallel, TensorParallel
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.estimate import estimate, layer_activations, micro_batches_in_flight
from llmpipe.train.job import Job
from llmpipe.train.setup import prepare


def recipe(**changes: Any) -> Recipe:
    return Recipe(**({"seq_len": 4096, "global_batch": 64, "steps": 10, "lr": 1e-4} | changes))


def test_states_of_llama_2_7b_on_eight_gpus() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig())  # its defaults are Llama 2 7B's
    count = model.num_parameters()
    layout = Layout(gpus_per_node=8).resolved()
    need = estimate(named_size("llama2_7b"), recipe(), layout, 0, num_micro_batches=1)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    outside = count - 32 * layer
    assert need.parameters == need.gradients == count / 8 * 4 and need.optimizer == count / 8 * 8
    # in bf16 whole: what is outside of layers, and two layers at a time
    assert need.gathered == pytest.approx(2 * (outside + 2 * layer))
    assert estimate(named_size("llama2_7b"), recipe(), layout, 0, 8) == need


def held_by_tensors() -> int:
    """The bytes of all tensors of this rank, and of their gradients: Python knows of those only when it asks.

    Those of its parent are frozen, and not among them.
    """
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [local(tensor).untyped_storage() for tensor in (*tensors, *gradients)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_in_a_step(job: Job) -> tuple[int, int, int]:
    """Bytes: of weights and gradients before the last micro-batch, and before the optimizer; of its state."""
    before = held_by_tensors()
    trainer = prepare(job)
    batch = trainer.loader.step(0)
    for i, (tokens, cu_seqlens, labels, weights) in enumerate(batch.micro_batches()):
        before_micro_batch(trainer.model[0], job.layout, is_last=i == 1)
        trainer.model[0](tokens, cu_seqlens, labels, weights).backward()
        trainer.model.hits.clear()
        if i == 0:
            in_passes = held_by_tensors() - before
    trainer.optimizer.reduce_and_clip()
    of_step = held_by_tensors() - before
    trainer.optimizer.step(1e-3, 0.1)
    state = [value for of_one in trainer.optimizer.adamw.state.values() for value in of_one.values() if value.ndim]
    return in_passes, of_step, sum(tensor.nbytes for tensor in state)


def held_by_kinds_of_numbers(job: Job, recipes: list[Recipe]) -> list[tuple[int, int, int]]:
    return [held_in_a_step(replace(job, recipe=recipe)) for recipe in recipes]


@pytest.mark.parametrize("kind", ["alone", "full", "optimizer", "plain"])
def test_every_kind_of_numbers_takes_what_is_estimated(kind, checkpoint, dataset, tmp_path) -> None:
    """What tensors really take, before the second of two micro-batches and before the optimizer's step."""
    numbers = [
        {"precision": precision, "parameters": parameters, "gradients": gradients}
        for precision, parameters, gradients in product(("fp32", "bf16", "fp16"), ("fp32", "bf16"), ("fp32", "bf16"))
    ]
    layout = {"micro_batch": 4} if kind == "alone" else {"dp": 2, "data_parallel": kind}
    recipes = [replace(RECIPE, **given) for given in numbers]
    job = make_job(checkpoint, dataset, tmp_path / "run", **layout)
    shape = open_source(checkpoint).shape
    for given, (in_passes, of_step, state) in zip(
        recipes, run_ranks(held_by_kinds_of_numbers, job.layout.processes, job, recipes)[0], strict=True
    ):
        need = estimate(shape, given, job.layout, 0, 2)
        stays = 0 if job.layout.gathers_again else need.gathered
        held = max(in_passes, of_step + stays)
        assert held == pytest.approx(need.parameters + stays + need.gradients, abs=12_000), given
        assert state == pytest.approx(need.optimizer, rel=0.01), given


def test_stages_and_slices_add_up_to_the_model() -> None:
    shape = named_size("llama2_70b")
    layout = Layout(nodes=4, gpus_per_node=8, tp=8, pp=4).resolved()
    parts = [estimate(shape, recipe(), layout, rank, 16).optimizer for rank in range(4)]
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                             num_key_value_heads=8)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # each tp rank has all of them
    assert sum(parts) == pytest.approx(8 * ((model.num_parameters() - norms) / 8 + norms))


def kept_bytes(shape: Shape, num_tokens: int) -> int:
    """What one layer's forward pass leaves for its backward pass, parameters and rotary tables aside."""
    layer = Layer(shape, TensorParallel(), 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    packed = Packed(torch.tensor([0, num_tokens], dtype=torch.int32), ContextParallel())
    cos, sin = rope_table(packed.positions(), packed.lengths(), shape)
    aside = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), cos, sin)}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in aside:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[torch.Tensor] = []  # alive, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or note(tensor), lambda x: x):
        layer(torch.randn(num_tokens, shape.hidden, requires_grad=True), cos, sin, packed)
    return sum(found.values())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "falcon"])
def test_activations_of_a_layer_are_those_that_autograd_keeps(kind: str) -> None:
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
    more = {"falcon": {}, "llama": {"intermediate_size": 512, "num_key_value_heads": 2}}
    more["qwen3"] = more["llama"] | {"head_dim": 64}
    config = AutoConfig.for_model(kind, **sizes, **more[kind])
    with torch.device("meta"):
        name = type(AutoModelForCausalLM.from_config(config)).__name__
    shape = from_hf_config(json.loads(config.to_json_string()) | {"architectures": [name]})
    measured = kept_bytes(shape, 512)
    assert 4 * layer_activations(shape, 512, tp=1, device="cpu") == pytest.approx(measured, rel=0.01)


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    """1F1B: Narayanan et al. 2021, §2.2.1: pp on the first rank, one on the last; GPipe: all."""
    of = Layout(gpus_per_node=4, pp=4, device="cpu").resolved()
    assert [micro_batches_in_flight(of, rank, 16) for rank in range(4)] == [4, 3, 2, 1]
    gpipe = Layout(gpus_per_node=4, pp=4, pp_schedule="gpipe", device="cpu").resolved()
    assert micro_batches_in_flight(gpipe, 0, 16) == 16
    # §2.2.2: interleaving keeps 1 + (pp - 1) / (pp · vp) times as many on the first rank
    interleaved = Layout(gpus_per_node=4, pp=4, vp=2, device="cpu").resolved()
    assert micro_batches_in_flight(interleaved, 0, 16) == pytest.approx(4 * (1 + 3 / 8))

"""What parameters, gradients and optimizer state are held in, and what of them is lost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from llmpipe.checkpoint.formats import open_source
from llmpipe.layout import Layout
from llmpipe.model.decoder import Decoder
from llmpipe.parallel.data import distribute, local
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.pipeline import Pipeline
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Schedule
from llmpipe.train.job import Job
from llmpipe.train.loop import run_steps
from llmpipe.train.setup import prepare

SLOW = replace(RECIPE, precision="bf16", steps=5, lr=1e-5, schedule=Schedule(kind="constant"), weight_decay=0.0)


def held(job: Job) -> dict[str, Any]:
    """The model's tensors and the optimizer's before and after a training, in numpy's types."""
    trainer = prepare(job)
    optimizer = trainer.optimizer

    def copies(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {key: tensor.detach().float().numpy().copy() for key, tensor in tensors.items()}

    found = {"before": copies(optimizer.parameters), "model before": copies(optimizer.shards)}
    run_steps(trainer, 0)
    state = {
        str(value.dtype) for state in optimizer.adamw.state.values() for key, value in state.items() if key != "step"
    }
    return found | {
        "after": copies(optimizer.parameters),
        "model after": copies(optimizer.shards),
        "dtypes": ({str(p.dtype) for p in optimizer.parameters.values()}, state),
    }


def test_master_weights_keep_what_bf16_loses(checkpoint, dataset, tmp_path) -> None:
    (found,) = run_ranks(held, 1, make_job(checkpoint, dataset, tmp_path / "run", SLOW))
    assert found["dtypes"] == ({"torch.float32"}, {"torch.float32"})
    source = open_source(checkpoint)
    for key in source.keys():  # noqa: SIM118
        start, end = (torch.from_numpy(found[when][key]) for when in ("before", "after"))
        assert torch.equal(start, source.read(key))  # the source's fp32, not what the model holds of it
        assert torch.equal(torch.from_numpy(found["model before"][key]), start.bfloat16().float())
        assert torch.equal(torch.from_numpy(found["model after"][key]), end.bfloat16().float())
        if key != "embedding.weight":  # which has rows that no token asks for
            assert (start != end).float().mean() > 0.99


def test_without_them_steps_below_half_a_unit_in_the_last_place_are_lost(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(SLOW, parameters="bf16"))
    (found,) = run_ranks(held, 1, job)
    assert found["dtypes"] == ({"torch.bfloat16"}, {"torch.bfloat16"})
    for key, start in found["before"].items():
        large = abs(start) >= 2**-3  # a unit is 2⁻¹⁰, and 5 steps of at most about 2·10⁻⁵ do not make half of one
        assert (found["after"][key][large] == start[large]).all()
    assert any((found["after"][key] != start).any() for key, start in found["before"].items())


@dataclass
class Batches:
    """Micro-batches of one row each."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def micro_batches(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for tokens, labels in zip(self.tokens, self.labels, strict=True):
            bounds = torch.tensor([0, tokens.numel()], dtype=torch.int32)
            yield tokens.flatten(), bounds, labels.flatten(), torch.ones(tokens.numel())


def accumulated(gradients: torch.dtype) -> float:
    """The gradient of 32 micro-batches together, against the fp64 sum of each one's alone: relative L2, at most."""
    groups = make_groups(Layout(device="cpu").resolved(), torch.device("cpu"))
    reference = theirs("llama")
    shape = shape_of(reference)
    model = Decoder(shape)
    model.load_state_dict(in_our_names(reference.state_dict(), shape))
    distribute(model, groups, torch.bfloat16, gradients)
    pipeline = Pipeline(torch.nn.ModuleList([model]), groups, 16, shape.hidden, torch.bfloat16)
    torch.manual_seed(0)
    batch = Batches(*torch.randint(VOCAB, (2, 32, 1, 16)))

    def gradient(batch: Batches) -> dict[str, torch.Tensor]:
        pipeline.forward_backward(batch, torch.ones(()))
        found = {key: local(p.grad).double() for key, p in model.named_parameters()}
        model.zero_grad()
        return found

    alone = [gradient(Batches(batch.tokens[i : i + 1], batch.labels[i : i + 1])) for i in range(32)]
    together = gradient(batch)
    sums = {key: sum(part[key] for part in alone) for key in together}
    return max(((together[key] - total).norm() / total.norm()).item() for key, total in sums.items())


def test_gradients_of_micro_batches_are_summed_in_fp32_or_in_bf16() -> None:
    (exact,), (rounded,) = run_ranks(accumulated, 1, torch.float32), run_ranks(accumulated, 1, torch.bfloat16)
    assert exact <= 1e-6
    assert 1e-3 < rounded < 5e-2  # 31 roundings of 2⁻⁹ at most each


@pytest.mark.parametrize("keys", [["parameters"], ["gradients"], ["parameters", "gradients"]], ids=str)
def test_what_is_kept_in_bf16_follows_fp32(keys: list[str], checkpoint, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, steps=5, precision="bf16")
    plain = losses(run_job(make_job(checkpoint, dataset, tmp_path / "plain", recipe)))
    changed = replace(recipe, **dict.fromkeys(keys, "bf16"))
    lines = run_job(make_job(checkpoint, dataset, tmp_path / "bf16", changed, tp=2))
    torch.testing.assert_close(losses(lines), plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_bf16_resumes_to_the_bit(parameters, checkpoint, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, steps=12, precision="bf16", parameters=parameters)
    whole = make_job(checkpoint, dataset, tmp_path / "whole", recipe, dp=2)
    lines = run_job(whole)
    half = make_job(checkpoint, dataset, tmp_path / "half", replace(recipe, save_every=10), dp=2)
    run_ranks(train_until_10, 2, half)
    (half.run / "stop").unlink()
    assert [line["loss"] for line in run_job(half)] == [line["loss"] for line in lines]
    assert_same_weights(whole.run / "weights", half.run / "weights")

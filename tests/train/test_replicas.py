"""Ranks that hold the same weights find the one of them that differs."""

import struct
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import RECIPE, make_job, run_job

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks
from llmpipe.train import loop, saver
from llmpipe.train.job import Job
from llmpipe.train.replicas import disagreeing, hash_bits

CHECKED = replace(RECIPE, steps=3, check_replicas_every=2)


def train_with_a_flipped_bit(job: Job, rank: int, key: str) -> None:
    """After the gradient of step 2, in one rank's copy of a weight."""
    original = loop.gradient

    def flip(trainer: loop.Trainer, step: int) -> tuple[float, float]:
        if step == 1 and dist.get_rank() == rank:
            trainer.optimizer.parameters[key].detach().view(torch.int32).view(-1)[0] ^= 1
        return original(trainer, step)

    loop.gradient = flip
    loop.train(job)


@pytest.mark.parametrize(
    ("layout", "key", "rank", "named"),
    [
        ({"tp": 4}, "norm.weight", 2, r"ranks \[0, 1, 2, 3\], .* of norm\.weight, \[2\] disagree"),
        # two KV heads on four ranks: one of two differs, and nobody knows which
        ({"tp": 4}, "layers.1.attention.k.weight", 2, r"ranks \[2, 3\], .* of layers.1.attention.k.weight, \[2, 3\]"),
        ({"dp": 4, "data_parallel": "plain"}, "norm.weight", 2, r"ranks \[0, 1, 2, 3\], .*, \[2\] disagree"),
        # each node has the whole model once, half of it on each of its two ranks
        ({"dp": 4, "nodes": 2, "data_parallel": "hybrid"}, "norm.weight", 2, r"ranks \[0, 2\], .*, \[0, 2\] disagree"),
    ],
    ids=["norm", "KV head", "over dp", "over nodes"],
)
def test_a_flipped_bit_stops_the_run(layout, key, rank, named, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=CHECKED, **layout)
    with pytest.raises(UserError, match=rf"step 2: of the {named}"):
        run_ranks(train_with_a_flipped_bit, 4, job, rank, key)


def train_with_a_flipped_bit_beside_a_slow_save(job: Job, rank: int, key: str) -> None:
    """The checkpoint of step 1 is not written when step 2 is done."""
    save = saver.dcp_save

    def save_slowly(*given: Any, **more: Any) -> Any:
        time.sleep(2)
        return save(*given, **more)

    saver.dcp_save = save_slowly  # type: ignore[assignment]
    train_with_a_flipped_bit(job, rank, key)


def test_no_checkpoint_holds_what_ranks_disagree_on(checkpoint, dataset, tmp_path) -> None:
    """The one of the step before, which is under way then, is whole."""
    recipe = replace(CHECKED, check_replicas_every=100, save_every=1)
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe, tp=4)
    with pytest.raises(UserError, match="step 2: of the ranks"):
        run_ranks(train_with_a_flipped_bit_beside_a_slow_save, 4, job, 2, "norm.weight")
    assert [path.parent.name for path in job.checkpoints.glob("*/manifest.json")] == ["step-00000001"]


def test_ranks_that_agree_train_on(checkpoint, dataset, tmp_path) -> None:
    assert len(run_job(make_job(checkpoint, dataset, tmp_path / "run", recipe=CHECKED, tp=2, dp=2))) == 3


def test_the_minority_is_named() -> None:
    norm, other = ("norm", (0,), (8,)), ("norm", (8,), (8,))
    assert disagreeing([{norm: 1}, {norm: 1}, {other: 2}, {other: 2}]) is None
    assert disagreeing([{norm: 1}, {norm: 3}, {other: 2}, {norm: 1}]) == ("norm", [1], [0, 1, 3])
    assert disagreeing([{norm: 1}, {norm: 3}]) == ("norm", [0, 1], [0, 1])


def test_the_hash_is_over_bits_and_places() -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    bits = struct.unpack("15i", tensor.numpy().tobytes())
    expected = sum(value * (2 * place + 1) for place, value in enumerate(bits)) % 2**64
    assert hash_bits(tensor) % 2**64 == expected
    assert hash_bits(tensor.T) != hash_bits(tensor)
    assert hash_bits(tensor.bfloat16()) == hash_bits(tensor.bfloat16().clone())

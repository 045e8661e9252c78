"""Trainings whose batch, rate and decay change: as transformers' with torch's AdamW, in every layout, over a resume.

The batch grows by hand after Megatron's rule: sizes change once 8 and 16 samples are seen.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10, trained_by_transformers

from llmpipe.errors import UserError
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import BatchRamp, Schedule, WeightDecayRamp
from llmpipe.train.dry_run import told
from llmpipe.train.preflight import preflight

SIZES = [4, 4, 8, 12, 12, 12]
RAMPS = replace(
    RECIPE,
    steps=6,
    global_batch=12,
    batch_ramp=BatchRamp(start=4, increment=4, samples=16),
    schedule=Schedule(kind="wsd", warmup_samples=8, decay=2, min_lr=1e-4),
    weight_decay_ramp=WeightDecayRamp(end=0.3),
    decay_embedding=False,
)


@pytest.mark.parametrize("layout", [{}, {"dp": 2}, {"pp": 2, "micro_batch": 1}], ids=["1", "dp2", "pp2"])
def test_trains_as_transformers_in_batches_that_grow(layout, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", RAMPS, **layout)
    preflight(job)
    lines = run_job(job)
    decays = [0.1 + 0.2 * sum(SIZES[:step]) / sum(SIZES) for step in range(6)]
    _, expected = trained_by_transformers(checkpoint, dataset, lines, SIZES, decays, undecayed="embed_tokens")
    torch.testing.assert_close(losses(lines), expected, rtol=1e-5, atol=0)
    assert [line["tokens"] for line in lines] == [32 * sum(SIZES[: step + 1]) for step in range(6)]
    assert lines[2]["tokens_per_second"] == pytest.approx(8 * 32 / lines[2]["seconds"], rel=1e-2)
    assert json.loads((job.run / "run.json").read_text())["tokens"] == 32 * sum(SIZES)


def test_resumes_to_the_bit_while_batches_grow(checkpoint, dataset, tmp_path) -> None:
    growing = BatchRamp(start=2, increment=2, samples=70)  # to 8: still 6 at step 10, where it stops
    recipe = replace(RAMPS, steps=14, global_batch=8, batch_ramp=growing, save_every=50)
    layout = {"pp": 2, "micro_batch": 1}
    whole = make_job(checkpoint, dataset, tmp_path / "whole", recipe, **layout)
    half = make_job(checkpoint, dataset, tmp_path / "half", recipe, **layout)
    whole_lines = run_job(whole)
    run_ranks(train_until_10, 2, half)
    (half.run / "stop").unlink()
    assert [line["loss"] for line in run_job(half)] == [line["loss"] for line in whole_lines]
    assert_same_weights(whole.run / "weights", half.run / "weights")


def test_a_size_that_does_not_deal_out_is_refused(checkpoint, dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_ramp 4 is not divisible by dp 4 x micro_batch 2 = 8: change batch_ramp"):
        preflight(make_job(checkpoint, dataset, tmp_path, replace(RAMPS, global_batch=16), dp=4))
    with pytest.raises(UserError, match="a global batch of 4 gives each pipeline 2 micro-batches of 2, fewer than"):
        preflight(make_job(checkpoint, dataset, tmp_path, RAMPS, pp=4))


def test_past_the_ramp_it_goes_on_in_a_layout_of_the_last_size_alone(checkpoint, dataset, tmp_path: Path) -> None:
    alone, three = (make_job(checkpoint, dataset, tmp_path / "run", RAMPS, micro_batch=1, dp=dp) for dp in (1, 3))
    with pytest.raises(UserError, match="batch_ramp 4 is not divisible by dp 3"):
        preflight(three)
    for step, refused in ((2, "batch_ramp 8 is not divisible by dp 3"), (3, "")):
        run_job(replace(alone, exit_at_step=step))
        with pytest.raises(UserError, match=refused) if refused else nullcontext():
            preflight(three)
    assert "the first micro-batch: 32 tokens" in told(three, colours=False)

    part = three.checkpoints / "step-00000003/__0_0.distcp"
    content = part.read_bytes()
    part.write_bytes(content[1:])
    with pytest.raises(UserError, match="batch_ramp 8 is not divisible by dp 3"):  # damaged: the one before is taken
        run_job(three)
    part.write_bytes(content)
    whole = run_job(make_job(checkpoint, dataset, tmp_path / "whole", RAMPS, micro_batch=1))
    torch.testing.assert_close(losses(run_job(three)), losses(whole), rtol=1e-5, atol=0)

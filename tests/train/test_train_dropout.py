"""Dropout in trainings: the same in any pipeline, after a restart, and beside recompute."""

from dataclasses import replace

import torch
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10

from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Dropout

DROPPING = replace(RECIPE, dropout=Dropout(hidden=0.2, attention=0.1, lima=True))


def test_a_resumed_run_draws_what_the_undisturbed_one_does(checkpoint, dataset, tmp_path) -> None:
    whole = make_job(checkpoint, dataset, tmp_path / "whole", replace(DROPPING, steps=12), tp=2, dp=2)
    lines = run_job(whole)
    half = make_job(checkpoint, dataset, tmp_path / "half", replace(DROPPING, steps=12, save_every=10), tp=2, dp=2)
    run_ranks(train_until_10, 4, half)
    (half.run / "stop").unlink()
    assert [line["loss"] for line in run_job(half)] == [line["loss"] for line in lines]
    assert_same_weights(whole.run / "weights", half.run / "weights")


def test_pipelines_drop_what_one_process_does(checkpoint, dataset, tmp_path) -> None:
    recipe = replace(DROPPING, steps=5)
    single = losses(run_job(make_job(checkpoint, dataset, tmp_path / "single", recipe)))
    piped = losses(run_job(make_job(checkpoint, dataset, tmp_path / "pp2", replace(recipe, recompute="full"), pp=2)))
    torch.testing.assert_close(piped, single, rtol=1e-5, atol=0)
    plain = losses(run_job(make_job(checkpoint, dataset, tmp_path / "plain", replace(recipe, dropout=Dropout()))))
    assert not torch.allclose(single, plain, rtol=1e-3)

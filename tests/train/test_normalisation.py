"""The same global batch in other micro-batches has the same gradient: Σ w·ℓ / Σ w, whatever the split (decision 10)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from chats import make_chats
from jobs import RECIPE, make_job
from numpy.typing import NDArray

from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.loop import gradient
from llmpipe.train.setup import prepare
from tiny_llama import make_checkpoint

DOCUMENTS = replace(RECIPE, clip=1e9)
CHATS = replace(DOCUMENTS, seq_len=128, scalar_loss_mask=0.3)
RECIPES = {"documents": DOCUMENTS, "chats, packed": CHATS, "chats, one by one": replace(CHATS, packing=False)}


def gradient_of(job: Job) -> dict[str, NDArray]:
    """Of the first step, by tensor."""
    trainer = prepare(job)
    trainer.observer.begin(1)
    gradient(trainer, 0)
    parameters = trainer.optimizer.parameters.items()
    return {key: parameter.grad.numpy() for key, parameter in parameters if parameter.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_gradients_do_not_depend_on_the_split(recipe: Recipe, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    model, data = checkpoint, dataset
    if recipe is not DOCUMENTS:
        model = make_checkpoint(tmp_path / "model")
        data = make_chats(model, tmp_path)

    def split(micro_batch: int) -> dict[str, NDArray]:
        job = make_job(model, data, tmp_path / f"{micro_batch}", recipe, micro_batch=micro_batch)
        return run_ranks(gradient_of, 1, replace(job, split=[1, 0, 0]))[0]

    whole = split(8)
    for found in (split(1), split(2)):
        assert found.keys() == whole.keys() and len(whole) > 20
        for key, expected in whole.items():
            norm = np.linalg.norm(expected)
            assert norm > 0 and np.linalg.norm(found[key] - expected) <= 1e-6 * norm, key

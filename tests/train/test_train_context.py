"""Context parallelism with windows, and with documents that cross, trains as one process does; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import RECIPE, losses, make_job, run_job, train_until_10

from hf_twins import theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.preflight import check_tokens, preflight

SHORT = replace(RECIPE, steps=5)
CROSSING = replace(SHORT, isolate_documents=False)
LAYOUTS = {
    "cp4, crossing": ("llama", CROSSING, {"cp": 4, "micro_batch": 1}),
    "cp2-tp2, window": ("mistral, window", CROSSING, {"cp": 2, "tp": 2}),
    "cp2-pp2": ("mistral, window", SHORT, {"cp": 2, "pp": 2, "pp_layers": [1, 2]}),
}
Run = tuple[Job, list[dict]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a twin, made once."""
    made: dict[str, Path] = {}

    def checkpoint_of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model")
            theirs(name, vocab_size=203).save_pretrained(made[name])
            manifest.write(made[name], "checkpoint", {})
        return made[name]

    return checkpoint_of


@pytest.fixture(scope="module")
def alone(models, dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Recipe], Run]:
    """A training in one process, run once."""
    run: dict[tuple[str, bool, int], Run] = {}

    def trained(name: str, recipe: Recipe) -> Run:
        key = name, recipe.isolate_documents, recipe.steps
        if key not in run:
            job = make_job(models(name), dataset, tmp_path_factory.mktemp("alone"), recipe)
            run[key] = job, run_job(job)
        return run[key]

    return trained


def assert_same_training(job: Job, lines: list[dict], expected: Run, weights: float = 1e-4) -> None:
    torch.testing.assert_close(losses(lines), losses(expected[1]), rtol=1e-5, atol=0)
    ours, reference = (open_source(made.run / "weights") for made in (job, expected[0]))
    for key in reference.keys():  # noqa: SIM118
        difference = ours.read(key) - reference.read(key)
        assert difference.norm() <= weights * reference.read(key).norm(), key


@pytest.mark.parametrize(("name", "recipe", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_trains_as_one_process(name, recipe, layout, models, alone, dataset, tmp_path) -> None:
    job = make_job(models(name), dataset, tmp_path / "run", recipe, **layout)
    preflight(job)
    assert_same_training(job, run_job(job), alone(name, recipe))


def test_resumes_without_context_ranks(models, alone, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, steps=12)
    first = make_job(models("llama"), dataset, tmp_path / "run", recipe, cp=2)
    run_ranks(train_until_10, 2, first)
    (first.run / "stop").unlink()
    second = make_job(models("llama"), dataset, tmp_path / "run", recipe, tp=2)
    assert_same_training(second, run_job(second), alone("llama", recipe), weights=1e-5)


def test_tokens_that_cannot_be_shared_out_are_refused_naming_what_would_work() -> None:
    with pytest.raises(
        UserError, match="micro_batch 3 x seq_len 50 = 150 tokens are not divisible by 12, as cp 2"
    ) as e:
        check_tokens(Layout(cp=2, tp=6, micro_batch=3), 50)
    assert "seq_len 48 or 52 would work" in str(e.value)
    for seq_len in (48, 52):
        check_tokens(Layout(cp=2, tp=6, micro_batch=3), seq_len)
    with pytest.raises(
        UserError, match="4 tokens are not divisible by 8, as cp 4 and tp 1 need it: seq_len 8 would work"
    ):
        check_tokens(Layout(cp=4), 4)
    check_tokens(Layout(tp=4), 4)

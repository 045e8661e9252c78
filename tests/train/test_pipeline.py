"""Pipeline schedules and virtual stages: as in one process, resumed to the bit, and refused where they cannot work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import RECIPE, losses, make_job, run_job

from hf_twins import theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight

MODELS = {"llama": "llama", "falcon": "falcon, 4 heads"}  # grouped queries; one KV head, tied embeddings
SHORT = replace(RECIPE, steps=5)
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pp2, gpipe": ("llama", {"pp": 2, "pp_schedule": "gpipe"}),
    "pp2 x vp3": ("falcon", {"pp": 2, "vp": 3}),
    "pp2, zero-bubble": ("llama", {"pp": 2, "pp_schedule": "zero-bubble"}),
    "pp2 x vp2, zero-bubble, uneven": (
        "falcon", {"pp": 2, "vp": 2, "pp_schedule": "zero-bubble", "pp_layers": [2, 1, 2, 1]}
    ),
    "pp2 x vp3, 3 micro-batches": ("llama", {"pp": 2, "vp": 3, "micro_batch": 4}),
    "pp2, uneven": ("falcon", {"pp": 2, "pp_layers": [1, 5]}),
    "pp3, 4 micro-batches": ("llama", {"pp": 3, "micro_batch": 3}),
    "pp3, 12 micro-batches": ("falcon", {"pp": 3, "micro_batch": 1}),
    "pp2 x vp3 x tp2 x dp2": ("llama", {"pp": 2, "vp": 3, "tp": 2, "dp": 2, "micro_batch": 1}),
    "pp2 x vp3 x tp2 x dp2, zero-bubble": (
        "falcon", {"pp": 2, "vp": 3, "tp": 2, "dp": 2, "pp_schedule": "zero-bubble", "micro_batch": 1}
    ),
}  # fmt: skip
RECIPE6 = replace(RECIPE, steps=4, global_batch=12)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint with 6 layers of each family."""
    made = {}
    for name, twin in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        theirs(twin, vocab_size=203, num_hidden_layers=6).save_pretrained(made[name])
        manifest.write(made[name], "checkpoint", {})
    return made


@pytest.fixture(scope="module")
def alone(models, dataset, tmp_path_factory) -> dict[str, tuple[Job, list[dict]]]:
    """Each family's training in one process."""
    jobs = {name: make_job(models[name], dataset, tmp_path_factory.mktemp("alone"), RECIPE6) for name in models}
    return {name: (job, run_job(job)) for name, job in jobs.items()}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_schedule_trains_as_one_process(name, layout, models, alone, dataset, tmp_path) -> None:
    job = make_job(models[name], dataset, tmp_path / "run", RECIPE6, **layout)
    preflight(job)
    lines = run_job(job)
    reference, expected = alone[name]
    torch.testing.assert_close(losses(lines), losses(expected), rtol=1e-5, atol=0)
    ours, theirs = open_source(job.run / "weights"), open_source(reference.run / "weights")
    for key in theirs.keys():  # noqa: SIM118
        assert (ours.read(key) - theirs.read(key)).norm() <= 1e-4 * theirs.read(key).norm(), key

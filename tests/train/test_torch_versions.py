"""What older torch does wrong, or cannot, is refused before anything trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import RECIPE, make_job
from torch.torch_version import TorchVersion

from llmpipe.errors import UserError
from llmpipe.train.preflight import preflight

OLD, NEW = TorchVersion("2.11.0+cu130"), TorchVersion("2.13.0")
CASES = {
    # Losses are off by 8e-3 from the second step on: tests/train/test_compile.py on torch 2.11.
    "compile: true with tp 2": ({"compile": True}, {"tp": 2}),
    # "Attribute '_input_metadata' is invalid": tests/train/test_pipeline.py on torch 2.11.
    "pp_schedule zero-bubble": ({}, {"pp": 2, "pp_schedule": "zero-bubble", "micro_batch": 2}),
}


@pytest.mark.parametrize(("named", "changes", "layout"), [(name, *case) for name, case in CASES.items()], ids=CASES)
def test_an_older_torch_is_refused_what_it_does_wrong(
    named: str, changes: dict[str, Any], layout: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path,
    monkeypatch,
) -> None:  # fmt: skip
    job = make_job(checkpoint, dataset, tmp_path, replace(RECIPE, **changes), **layout)
    monkeypatch.setattr(torch, "__version__", NEW)
    preflight(job)
    monkeypatch.setattr(torch, "__version__", OLD)
    with pytest.raises(UserError, match=rf"{named} .*would work"):
        preflight(job)


def test_an_older_torch_does_the_rest(checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", OLD)
    preflight(make_job(checkpoint, dataset, tmp_path / "dp", replace(RECIPE, compile=True), dp=2))
    preflight(make_job(checkpoint, dataset, tmp_path / "pp", RECIPE, pp=2, micro_batch=2))

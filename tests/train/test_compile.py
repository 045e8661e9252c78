"""Compiled layers train as those that are not."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from jobs import RECIPE, losses, make_job, run_job
from torch.torch_version import TorchVersion

from hf_twins import shape_of, theirs
from llmpipe.errors import UserError
from llmpipe.model.decoder import Decoder
from llmpipe.recipe import Dropout
from llmpipe.train.preflight import check_compile

CASES = {
    "one process, recomputed": ({"recompute": "full"}, {}),
    "tp2, selective, dropout": ({"recompute": "selective", "dropout": Dropout(hidden=0.1, lima=True)}, {"tp": 2}),
}


@pytest.mark.filterwarnings("default")  # torch's compiler warns of torch's own doings
@pytest.mark.parametrize(("changes", "layout"), CASES.values(), ids=CASES.keys())
def test_compiled_layers_train_as_others_do(
    changes, layout, checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch
) -> None:
    """By torch's graphs without its C++: that takes half a minute for each, and is torch's own."""
    if layout.get("tp", 1) > 1 and torch.__version__ < "2.13":
        pytest.skip("refused on this torch")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))  # torch makes it all the same
    recipe = replace(RECIPE, steps=3, **changes)
    eager = losses(run_job(make_job(checkpoint, dataset, tmp_path / "eager", recipe, **layout)))
    compiled = replace(recipe, compile=True)
    lines = run_job(make_job(checkpoint, dataset, tmp_path / "compiled", compiled, **layout))
    torch.testing.assert_close(losses(lines), eager, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("version", "layout", "works"),
    [("2.11.0", {"tp": 2}, False), ("2.11.0", {"dp": 2}, True), ("2.13.0+cpu", {"tp": 2}, True)],
)
def test_over_tp_ranks_they_need_a_torch_that_does_it_right(
    version: str, layout: dict[str, int], works: bool, checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch
) -> None:
    """On 2.11 the first test's losses are off by 8e-3 from the second step on."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    job = make_job(checkpoint, dataset, tmp_path, replace(RECIPE, compile=True), **layout)
    with nullcontext() if works else pytest.raises(UserError, match=r"compile: true with tp 2 .* torch 2\.13"):
        check_compile(job)


def test_each_layer_is_compiled_by_itself(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or function)
    model = Decoder(shape_of(theirs("llama")))
    model.compile_layers()
    assert [function.__self__ for function in asked] == list(model.layers.values())

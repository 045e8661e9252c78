"""Compiled layers train as those that are not."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from jobs import RECIPE, losses, make_job, run_job

from hf_twins import shape_of, theirs
from llmpipe.model.decoder import Decoder
from llmpipe.recipe import Dropout

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


def test_each_layer_is_compiled_by_itself(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function: asked.append(function) or function)
    model = Decoder(shape_of(theirs("llama")))
    model.compile_layers()
    assert [function.__self__ for function in asked] == list(model.layers.values())

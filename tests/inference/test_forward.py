"""The forward pass of models in several processes against transformers."""

from pathlib import Path

import pytest
import torch

from hf_twins import VOCAB, theirs
from llmpipe.checkpoint import manifest
from llmpipe.inference.forward import rank_logits
from llmpipe.layout import Stages

NUM_LAYERS = 5


@pytest.mark.parametrize(
    ("name", "tp", "stages"),
    [
        ("qwen2", 1, Stages(2, layers=(1, 4))),
        ("qwen2", 2, Stages(2, 2, (1, 2, 1, 1))),
        ("falcon 40b", 2, Stages(2, layers=(3, 2))),
        ("mistral, window", 1, Stages(2, 2, (1, 1, 2, 1))),
    ],
)
def test_logits_in_ranks_are_those_of_transformers(name: str, tp: int, stages: Stages, tmp_path: Path) -> None:
    model = theirs(name, num_hidden_layers=NUM_LAYERS)
    model.save_pretrained(tmp_path)
    manifest.write(tmp_path, "checkpoint", {})
    tokens = torch.randint(VOCAB, (3, 33))
    with torch.no_grad():
        expected = model(tokens).logits  # (B, T, V)
    logits = rank_logits(tmp_path, tokens, tp, stages)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

"""Our side of the comparison, block by block, against the whole model of transformers."""

from pathlib import Path

import pytest
import torch

from hf_twins import MODELS, VOCAB, theirs
from llmpipe.checkpoint import manifest
from llmpipe.verify.ours import OurModel


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_is_transformers_whole(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    manifest.write(tmp_path, "checkpoint", {})
    ours, tokens = OurModel(tmp_path), torch.randint(VOCAB, (2, 70))
    positions = torch.arange(70).expand(2, 70)
    with torch.no_grad():
        expected = model(tokens).logits  # (B, T, V)
        hidden = ours.embed(tokens)
        for layer in range(ours.num_layers):
            hidden = ours.block(layer, hidden, positions)
        logits = ours.head(hidden)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()

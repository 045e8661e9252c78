"""What is computed again in the backward pass: the same bits, and less kept."""

import pytest
import torch

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from live_bytes import Live
from llmpipe.model.decoder import Decoder
from llmpipe.model.recompute import Recompute
from llmpipe.recipe import Dropout

BOUNDS = torch.tensor([0, 5, 38, 128], dtype=torch.int32)
KINDS = [Recompute("full"), Recompute("full", 2), Recompute("selective"), Recompute("selective", 2)]


def step(name: str, recompute: Recompute, dropout: Dropout | None = None) -> tuple[torch.Tensor, dict, int]:
    """A loss, all gradients, and the bytes that are kept from the forward to the backward pass."""
    reference = theirs(name)
    shape = shape_of(reference)
    model = Decoder(shape, recompute=recompute, dropout=dropout)
    model.load_state_dict(in_our_names(reference.state_dict(), shape), strict=False)
    torch.manual_seed(0)
    tokens, labels = torch.randint(VOCAB, (2, 128))
    with Live() as live:
        loss = model(tokens, BOUNDS, labels, torch.ones(128), seed=torch.tensor([7]))
        kept = live.now
    loss.sum().backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters()}, kept


@pytest.mark.parametrize("name", ["llama", "falcon 40b", "qwen3"])
@pytest.mark.parametrize("dropout", [None, Dropout(hidden=0.2, attention=0.1)], ids=["plain", "dropout"])
def test_recomputing_changes_no_bit(name: str, dropout: Dropout | None) -> None:
    loss, gradients, _ = step(name, Recompute(), dropout)
    for recompute in KINDS:
        again, found, _ = step(name, recompute, dropout)
        assert torch.equal(again, loss), recompute
        for key, gradient in gradients.items():
            assert torch.equal(found[key], gradient), (recompute, key)


def test_less_is_kept() -> None:
    off, full, full_every_2, selective, selective_every_2 = (
        step("llama", recompute)[2] for recompute in (Recompute(), *KINDS)
    )
    assert full < full_every_2 < off
    assert full < selective < selective_every_2 < off
    # Of each of 3 layers and 128 tokens attention's output, 32 wide, and the activation and its product, 40 wide.
    assert off - selective >= 3 * 128 * (32 + 2 * 40) * 4

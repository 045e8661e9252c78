"""Dropout: its shares, its masks by key, and where in the layer it is."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_twins import VOCAB, in_our_names, shape_of, theirs
from llmpipe.errors import UserError
from llmpipe.layout import Coordinates
from llmpipe.model.attention import attend
from llmpipe.model.decoder import Decoder
from llmpipe.model.dropout import drop, micro_batch_seeds
from llmpipe.model.packed import Packed
from llmpipe.recipe import Dropout

BOUNDS = torch.tensor([0, 5, 16], dtype=torch.int32)


def test_a_share_is_zeroed_and_the_rest_grows() -> None:
    x = torch.ones(1000, 100)
    dropped = drop(x, 0.2, (1, 2))
    kept = dropped[dropped != 0]
    assert torch.equal(kept, torch.full_like(kept, 1 / (1 - 0.2)))
    # A binomial count: six standard deviations.
    assert abs(kept.numel() - 80_000) < 6 * (100_000 * 0.2 * 0.8) ** 0.5


def test_nothing_is_done_where_nothing_is_dropped() -> None:
    x = torch.ones(3)
    assert drop(x, 0.0, (1,)) is x
    assert drop(x, 0.5, None) is x


def test_a_mask_follows_from_its_key_alone() -> None:
    x = torch.ones(50)
    torch.manual_seed(0)
    first = drop(x, 0.5, (3, 1, "mlp"))
    torch.manual_seed(1)
    assert torch.equal(drop(x, 0.5, (3, 1, "mlp")), first)
    for other in ((4, 1, "mlp"), (3, 2, "mlp"), (3, 1, "attended")):
        assert not torch.equal(drop(x, 0.5, other), first)


def test_seeds_differ_by_step_place_and_micro_batch_but_not_by_stage() -> None:
    first = Coordinates(dp=0, cp=0, pp=0, tp=0)
    seeds = micro_batch_seeds(1234, 7, first, 4)
    assert torch.equal(micro_batch_seeds(1234, 7, Coordinates(dp=0, cp=0, pp=3, tp=0), 4), seeds)
    others = [
        Coordinates(dp=1, cp=0, pp=0, tp=0),
        Coordinates(dp=0, cp=1, pp=0, tp=0),
        Coordinates(dp=0, cp=0, pp=0, tp=1),
    ]
    tables = [seeds, *(micro_batch_seeds(1234, 7, at, 4) for at in others)]
    tables += [micro_batch_seeds(1234, 8, first, 4), micro_batch_seeds(1235, 7, first, 4)]
    assert len(set(torch.cat(tables).tolist())) == 4 * len(tables)


def test_limas_shares_rise_from_the_bottom_to_the_top() -> None:
    lima = Dropout(hidden=0.3, lima=True)
    assert lima.embedding == 0
    assert [lima.hidden_of(i, 32) for i in range(32)] == pytest.approx(np.linspace(0, 0.3, 32))
    assert lima.hidden_of(0, 1) == 0
    assert {Dropout(hidden=0.3).hidden_of(i, 32) for i in range(32)} == {0.3}
    with pytest.raises(UserError, match=r"dropout.hidden is 1.0"):
        Dropout(hidden=1.0)
    with pytest.raises(UserError, match=r"raises dropout.hidden over the layers, but that is 0"):
        Dropout(lima=True)


@pytest.mark.parametrize("window", [None, 4])
def test_attention_drops_probabilities(window: int | None) -> None:
    """Values that are unit vectors show the probabilities: each is 0, or what it was over 1 - rate."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(16, 4, 16, generator=generator), torch.randn(16, 2, 16, generator=generator)
    v = torch.eye(16)[:, None].expand(16, 2, 16)
    packed = Packed(BOUNDS)
    probabilities = attend(q, k, v, packed, window)
    before = torch.random.get_rng_state()
    dropped = attend(q, k, v, packed, window, 0.25, (1, 2, "attention"))
    assert torch.equal(torch.random.get_rng_state(), before)
    seen = probabilities > 0
    zeroed = seen & (dropped == 0)
    torch.testing.assert_close(dropped[~zeroed], probabilities[~zeroed] / 0.75)
    share = zeroed.sum() / seen.sum()
    assert abs(share - 0.25) < 6 * (0.25 * 0.75 / seen.sum()) ** 0.5
    assert torch.equal(attend(q, k, v, packed, window, 0.25, (1, 2, "attention")), dropped)
    assert not torch.equal(attend(q, k, v, packed, window, 0.25, (1, 3, "attention")), dropped)


@pytest.mark.parametrize("name", ["llama", "falcon 40b"])
def test_all_that_a_layer_adds_passes_through_dropout(name: str) -> None:
    """At a rate of almost 1 nothing is added to the embedding; LIMA's first layer adds all, its last nothing."""
    reference = theirs(name)
    shape = shape_of(reference)
    hidden, reached = 1 - 1e-9, []
    for dropout in (Dropout(hidden=hidden), Dropout(hidden=hidden, lima=True)):
        model = Decoder(shape, dropout=dropout)
        model.load_state_dict(in_our_names(reference.state_dict(), shape), strict=False)
        for i, layer in model.layers.items():
            layer.register_forward_hook(lambda _, given, out, i=i: reached.append((given[0], out)))
        with torch.no_grad():
            model(torch.randint(VOCAB, (16,)), BOUNDS, seed=torch.tensor([5]))
    everywhere, lima = reached[: shape.num_layers], reached[shape.num_layers :]
    assert all(torch.equal(given, out) for given, out in everywhere) and not everywhere[0][0].any()
    assert not torch.equal(*lima[0]) and torch.equal(*lima[-1])
    assert all(torch.equal(out, given) for (_, out), (given, _) in pairwise(lima))


def test_evaluation_drops_nothing() -> None:
    reference = theirs("llama")
    shape = shape_of(reference)
    models = [Decoder(shape, dropout=dropout) for dropout in (None, Dropout(hidden=0.5, attention=0.5))]
    tokens = torch.randint(VOCAB, (16,))
    outs = []
    for model in models:
        model.load_state_dict(in_our_names(reference.state_dict(), shape), strict=False)
        outs.append(model(tokens, BOUNDS))
    assert torch.equal(*outs)

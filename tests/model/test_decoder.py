"""The decoder against transformers, and the isolation of packed documents."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.families import FAMILIES, from_hf_config
from llmpipe.inference.forward import Engine
from llmpipe.layout import Layout, Stages
from llmpipe.model.decoder import Decoder
from llmpipe.model.packed import Packed
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def twins(**changes: object) -> tuple[LlamaForCausalLM, Decoder]:
    """A random Llama of transformers, and ours with its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **({"vocab_size": 101, "num_key_value_heads": 2, "max_position_embeddings": 4096} | SIZES | changes)
    )
    theirs = LlamaForCausalLM(config).eval()
    shape = from_hf_config(json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]})
    ours, family, weights = Decoder(shape), FAMILIES["llama"], theirs.state_dict()
    ours.load_state_dict({key: weights[family.hf_name(key, shape)] for key in family.keys(shape)}, strict=False)
    return theirs, ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"head_dim": 16},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-3},
    ],
    ids=["gqa", "mqa", "mha", "theta", "head_dim", "tied", "eps"],
)
def test_logits_are_those_of_transformers(changes) -> None:
    theirs, ours = twins(**changes)
    tokens = torch.randint(0, 101, (2, 300))
    with torch.no_grad():
        expected = theirs(tokens).logits
    assert torch.allclose(Engine([ours], None, torch.device("cpu")).logits(tokens), expected, atol=1e-5)


def test_gradients_are_those_of_transformers() -> None:
    theirs, ours = twins()
    tokens = torch.randint(0, 101, (3, 21))
    labels = torch.randint(0, 101, (3, 21))
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    bounds = torch.tensor([0, 21, 42, 63, 63], dtype=torch.int32)
    ours(tokens.flatten(), bounds, labels.flatten(), torch.ones(63)).sum().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        name = FAMILIES["llama"].hf_name(key, ours.shape)
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_a_document_moves_no_other_documents_logits() -> None:
    _, ours = twins()
    bounds = torch.tensor([0, 5, 18, 32], dtype=torch.int32)
    tokens = torch.randint(0, 101, (32,))
    changed = tokens.clone()
    changed[5:18] = (changed[5:18] + 1) % 101
    with torch.no_grad():
        before, after = ours(tokens, bounds), ours(changed, bounds)
        moved = (before != after).any(dim=-1)
    assert moved[5:18].all() and not moved[:5].any() and not moved[18:].any()


def test_a_document_in_a_pack_is_as_if_alone() -> None:
    _, ours = twins()
    tokens = torch.randint(0, 101, (32,))
    with torch.no_grad():
        packed = ours(tokens, torch.tensor([0, 5, 18, 32], dtype=torch.int32))
        alone = ours(tokens[5:18], torch.tensor([0, 13], dtype=torch.int32))
    torch.testing.assert_close(packed[5:18], alone, rtol=0, atol=1e-6)


def leak(tp: int, pp: int) -> tuple[list[bool], list[bool]]:
    """In each layout: which tokens' last-stage outputs move when the second document changes."""
    _, whole = twins(num_key_value_heads=4, vocab_size=100)
    groups = make_groups(Layout(tp=tp, pp=pp, gpus_per_node=tp * pp, device="cpu").resolved(), torch.device("cpu"))
    model = Decoder(whole.shape, groups.tp, Stages(pp), groups.at.pp)
    from llmpipe.model.load import local_slices

    state = whole.state_dict()
    for key, parameter in model.named_parameters():
        parameter.data.copy_(state[key][local_slices(whole.shape, key, tp, groups.at.tp)])
    engine = Engine([model.eval()], groups, torch.device("cpu"))
    torch.manual_seed(1)
    tokens = torch.randint(0, 100, (32,))
    changed = tokens.clone()
    changed[5:18] = (changed[5:18] + 1) % 100
    bounds = torch.tensor([0, 5, 18, 32], dtype=torch.int32)
    with torch.no_grad():
        moved = (engine._through_stages(tokens, bounds) != engine._through_stages(changed, bounds)).any(dim=-1)
    return moved[5:18].tolist(), torch.cat([moved[:5], moved[18:]]).tolist()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_isolation_holds_in_every_layout_and_stage(tp: int, pp: int) -> None:
    for inside, outside in run_ranks(leak, tp * pp, tp, pp):
        assert all(inside) and not any(outside)


def test_positions_start_anew_in_each_document() -> None:
    packed = Packed(torch.tensor([0, 3, 4, 9, 9, 9], dtype=torch.int32))
    assert packed.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert packed.bounds == [0, 3, 4, 9]
    assert packed.longest == (5, 5)

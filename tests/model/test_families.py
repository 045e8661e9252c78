"""The decoder of every family and option against transformers, in fp32 on the CPU."""

import json
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_twins import MODELS, ORIGINAL, VOCAB, in_our_names, shape_of, theirs
from llmpipe.families import Shape, from_hf_config
from llmpipe.model.decoder import Decoder
from llmpipe.model.rope import longest_text, rope_table

# Ascending: transformers keeps the longest length that it has met for dynamic scaling.
BOUNDS = [0, 5, 38, 128]


def ours(weights: dict[str, torch.Tensor], shape: Shape) -> Decoder:
    model = Decoder(shape)
    missing = model.load_state_dict({key: weight.clone() for key, weight in weights.items()}, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"head.weight"}
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers_document_by_document(name: str) -> None:
    reference = theirs(name)
    shape = shape_of(reference)
    model = ours(in_our_names(reference.state_dict(), shape), shape)
    tokens, labels = torch.randint(VOCAB, (2, 128))
    expected = torch.cat([reference(tokens[None, a:b]).logits[0] for a, b in pairwise(BOUNDS)])  # (N, V)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    logits = model(tokens, bounds)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.nn.functional.cross_entropy(expected, labels, reduction="sum").backward()
    model(tokens, bounds, labels, torch.ones(128)).sum().backward()
    gradients = in_our_names({key: p.grad for key, p in reference.named_parameters() if p.grad is not None}, shape)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        assert (parameter.grad - gradients[key]).abs().max() <= 1e-4 * gradients[key].abs().max(), key


@pytest.mark.parametrize("name", ["mistral, window", "falcon 40b", "llama, dynamic"])
def test_a_document_moves_no_other_documents_logits(name: str) -> None:
    reference = theirs(name)
    shape = shape_of(reference)
    model = ours(in_our_names(reference.state_dict(), shape), shape)
    tokens = torch.randint(VOCAB, (128,))
    changed = tokens.clone()
    changed[5:38] = (changed[5:38] + 1) % VOCAB
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    with torch.no_grad():
        moved = (model(tokens, bounds) != model(changed, bounds)).any(dim=-1)
        alone = model(tokens[38:], torch.tensor([0, 90], dtype=torch.int32))
        together = model(tokens, bounds)[38:]
    assert moved[5:38].all() and not moved[:5].any() and not moved[38:].any()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("llama", ORIGINAL), ("llama, linear", 4 * ORIGINAL), ("llama, dynamic", 4 * ORIGINAL),
        ("llama, llama3", 8 * ORIGINAL), ("llama, yarn, mscale", 80), ("llama, yarn, no original", 2 * ORIGINAL),
    ],
)  # fmt: skip
def test_how_long_a_text_a_model_is_made_for(name: str, positions: int) -> None:
    assert longest_text(shape_of(theirs(name))) == positions


# As published: Llama 3.1 8B, Qwen2.5 7B with its yarn, vicuna-7b-v1.5-16k, and dynamic scaling at Llama 2's size.
PUBLISHED = {
    "llama3": (128, 5e5, 131072, {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    }),
    "yarn": (128, 1e6, 32768, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "linear": (128, 1e4, 4096, {"factor": 4.0}),
    "dynamic": (128, 1e4, 4096, {"factor": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PUBLISHED)
def test_rotary_tables_at_long_positions_are_those_of_transformers_bit_for_bit(kind: str) -> None:
    head_dim, theta, max_positions, settings = PUBLISHED[kind]
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=max_positions,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **settings},
    )  # fmt: skip
    shape = from_hf_config(json.loads(config.to_json_string()) | {"architectures": ["LlamaForCausalLM"]})
    positions = torch.tensor([0, 1, 4095, 4096, 8191, 16383])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    for ours, theirs_ in zip(rope_table(positions, torch.full((6,), 16384), shape), expected, strict=True):
        assert torch.equal(ours, theirs_[0])

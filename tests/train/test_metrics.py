"""The arithmetic of a token, counted from transformers' own parameters."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.families import named_size
from llmpipe.train.metrics import flops_per_token


def test_flops_of_llama_2_70b() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name)
    # Causal attention: each token meets half of the others, in QK and in AV, forward once and backward twice.
    attention = 80 * 64 * 128 * (4096 / 2) * 2 * 2 * 3
    assert flops_per_token(named_size("llama2_70b"), 4096) == pytest.approx(6 * matrices + attention)

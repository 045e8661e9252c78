"""Qwen 2, 2.5 and 3, dense: Llama with biases on q, k, v (2), or with norms on q and k (3)."""

from llmpipe.families.family import Family
from llmpipe.families.llama import CONFIG, TENSORS

_ONLY = {"hidden_act": "silu", "attention_dropout": 0.0}
_DEFAULTS = {"max_positions": 32768, "norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": 32}

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=TENSORS,
    config=CONFIG,
    windowed=True,
    window_switch=True,
    defaults=_DEFAULTS,
    fixed={"qkv_bias": True},
    only=_ONLY,
)
QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=TENSORS,
    config=CONFIG | {"qkv_bias": "attention_bias", "output_bias": "attention_bias"},
    windowed=True,
    window_switch=True,
    defaults=_DEFAULTS | {"head_dim": 128, "qkv_bias": False},
    fixed={"qk_norm": True},
    only=_ONLY,
)

"""Qwen 2, 2.5 and 3, dense: Llama with biases on q, k, v (2), or with norms on q and k (3)."""

from functools import partial
from typing import Any

from llmpipe.families.family import Family
from llmpipe.families.llama import CONFIG, TENSORS
from llmpipe.families.sizes import sized

_ONLY = {"hidden_act": "silu", "attention_dropout": 0.0}
_DEFAULTS = {"max_positions": 32768, "norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": 32}

_COMMON: dict[str, Any] = {"max_positions": 131072, "norm_eps": 1e-6, "rope_theta": 1e6}
_size2 = partial(sized, "qwen2", qkv_bias=True, **_COMMON)
_size3 = partial(sized, "qwen3", qk_norm=True, head_dim=128, vocab=151936, **_COMMON | {"max_positions": 40960})
_SMALL: dict[str, Any] = {"vocab": 151936, "tie_embeddings": True}
_LARGE: dict[str, Any] = {"vocab": 152064}
# The instruct models of 2.5 (and of 2, which are like them) say fewer positions, and the large ones another eps.
_INSTRUCT: dict[str, Any] = {"max_positions": 32768}

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
    sizes={  # num_layers, hidden, num_heads, num_kv_heads, ffn
        "qwen2_0_5b": _size2(24, 896, 14, 2, 4864, **_SMALL),
        "qwen2_1_5b": _size2(28, 1536, 12, 2, 8960, **_SMALL),
        "qwen2_7b": _size2(28, 3584, 28, 4, 18944, **_LARGE),
        "qwen2_72b": _size2(80, 8192, 64, 8, 29568, **_LARGE | {"norm_eps": 1e-5}),
        "qwen2_5_0_5b": _size2(24, 896, 14, 2, 4864, **_SMALL | _INSTRUCT),
        "qwen2_5_1_5b": _size2(28, 1536, 12, 2, 8960, **_SMALL),
        "qwen2_5_1_5b_instruct": _size2(28, 1536, 12, 2, 8960, **_SMALL | _INSTRUCT),
        "qwen2_5_3b": _size2(36, 2048, 16, 2, 11008, **_SMALL | _INSTRUCT),
        "qwen2_5_7b": _size2(28, 3584, 28, 4, 18944, **_LARGE),
        "qwen2_5_7b_instruct": _size2(28, 3584, 28, 4, 18944, **_LARGE | _INSTRUCT),
        "qwen2_5_14b": _size2(48, 5120, 40, 8, 13824, **_LARGE | {"norm_eps": 1e-5}),
        "qwen2_5_14b_instruct": _size2(48, 5120, 40, 8, 13824, **_LARGE | _INSTRUCT),
        "qwen2_5_32b": _size2(64, 5120, 40, 8, 27648, **_LARGE | {"norm_eps": 1e-5}),
        "qwen2_5_32b_instruct": _size2(64, 5120, 40, 8, 27648, **_LARGE | _INSTRUCT),
        "qwen2_5_72b": _size2(80, 8192, 64, 8, 29568, **_LARGE | {"norm_eps": 1e-5}),
        "qwen2_5_72b_instruct": _size2(80, 8192, 64, 8, 29568, **_LARGE | _INSTRUCT),
    },
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
    sizes={  # the -Base models have other positions
        "qwen3_0_6b": _size3(28, 1024, 16, 8, 3072, tie_embeddings=True),
        "qwen3_1_7b": _size3(28, 2048, 16, 8, 6144, tie_embeddings=True),
        "qwen3_4b": _size3(36, 2560, 32, 8, 9728, tie_embeddings=True),
        "qwen3_8b": _size3(36, 4096, 32, 8, 12288),
        "qwen3_14b": _size3(40, 5120, 40, 8, 17408),
        "qwen3_32b": _size3(64, 5120, 64, 8, 25600),
    },
)

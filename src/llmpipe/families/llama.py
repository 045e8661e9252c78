"""Llama: RMSNorm, rotary embeddings, SwiGLU, grouped queries. Llama 1 to 3.2, CodeLlama, Yi, OpenLLaMA, and all alike.

Sizes are the published config.json's.
"""

from functools import partial
from typing import Any

from llmpipe.families.family import Family, Tensor
from llmpipe.families.sizes import sized

_LAYER, _HF = "layers.{}", "model.layers.{}"
# Of every Llama-like family: the biases and the norms of q and k are there where the shape says so.
TENSORS = (
    Tensor("embedding.weight", "model.embed_tokens.weight", ("vocab", "hidden"), 0),
    Tensor(f"{_LAYER}.attention_norm.weight", f"{_HF}.input_layernorm.weight", ("hidden",), None),
    Tensor(f"{_LAYER}.attention.q.weight", f"{_HF}.self_attn.q_proj.weight", ("q", "hidden"), 0),
    Tensor(f"{_LAYER}.attention.q.bias", f"{_HF}.self_attn.q_proj.bias", ("q",), 0, when="qkv_bias"),
    Tensor(f"{_LAYER}.attention.k.weight", f"{_HF}.self_attn.k_proj.weight", ("kv", "hidden"), 0),
    Tensor(f"{_LAYER}.attention.k.bias", f"{_HF}.self_attn.k_proj.bias", ("kv",), 0, when="qkv_bias"),
    Tensor(f"{_LAYER}.attention.v.weight", f"{_HF}.self_attn.v_proj.weight", ("kv", "hidden"), 0),
    Tensor(f"{_LAYER}.attention.v.bias", f"{_HF}.self_attn.v_proj.bias", ("kv",), 0, when="qkv_bias"),
    Tensor(f"{_LAYER}.attention.q_norm.weight", f"{_HF}.self_attn.q_norm.weight", ("head",), None, when="qk_norm"),
    Tensor(f"{_LAYER}.attention.k_norm.weight", f"{_HF}.self_attn.k_norm.weight", ("head",), None, when="qk_norm"),
    Tensor(f"{_LAYER}.attention.o.weight", f"{_HF}.self_attn.o_proj.weight", ("hidden", "q"), 1),
    Tensor(f"{_LAYER}.attention.o.bias", f"{_HF}.self_attn.o_proj.bias", ("hidden",), None, when="output_bias"),
    Tensor(f"{_LAYER}.mlp_norm.weight", f"{_HF}.post_attention_layernorm.weight", ("hidden",), None),
    Tensor(f"{_LAYER}.mlp.gate.weight", f"{_HF}.mlp.gate_proj.weight", ("ffn", "hidden"), 0),
    Tensor(f"{_LAYER}.mlp.gate.bias", f"{_HF}.mlp.gate_proj.bias", ("ffn",), 0, when="mlp_bias"),
    Tensor(f"{_LAYER}.mlp.up.weight", f"{_HF}.mlp.up_proj.weight", ("ffn", "hidden"), 0),
    Tensor(f"{_LAYER}.mlp.up.bias", f"{_HF}.mlp.up_proj.bias", ("ffn",), 0, when="mlp_bias"),
    Tensor(f"{_LAYER}.mlp.down.weight", f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn"), 1),
    Tensor(f"{_LAYER}.mlp.down.bias", f"{_HF}.mlp.down_proj.bias", ("hidden",), None, when="mlp_bias"),
    Tensor("norm.weight", "model.norm.weight", ("hidden",), None),
    Tensor("head.weight", "lm_head.weight", ("vocab", "hidden"), 0),
)
CONFIG = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


_size = partial(sized, "llama")
# Meta's params.json gives 65B another eps than the three smaller; Megatron-LLM's preset has theirs for it too.
_LLAMA1: dict[str, Any] = {"max_positions": 2048, "norm_eps": 1e-6}
_CODE: dict[str, Any] = {"max_positions": 16384, "rope_theta": 1e6}
_LLAMA3: dict[str, Any] = {"vocab": 128256, "max_positions": 8192, "rope_theta": 5e5}
_ROPE3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA31 = _LLAMA3 | {"max_positions": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0} | _ROPE3}
_LLAMA32 = _LLAMA31 | {"rope_scaling": {"rope_type": "llama3", "factor": 32.0} | _ROPE3, "tie_embeddings": True}
_YI: dict[str, Any] = {"vocab": 64000, "rope_theta": 5e6}
_CHINESE: dict[str, Any] = _LLAMA1 | {"vocab": 49953}
_ALPACA: dict[str, Any] = _LLAMA1 | {"vocab": 49954}
# Chat and instruct models have their base's shape, but where they have a row of their own.
SIZES = {  # num_layers, hidden, num_heads, num_kv_heads, ffn; the rest as in Llama 2
    "llama_7b": _size(32, 4096, 32, 32, 11008, **_LLAMA1),
    "llama_13b": _size(40, 5120, 40, 40, 13824, **_LLAMA1),
    "llama_30b": _size(60, 6656, 52, 52, 17920, **_LLAMA1),
    "llama_65b": _size(80, 8192, 64, 64, 22016, max_positions=2048),
    "llama2_7b": _size(32, 4096, 32, 32, 11008),
    "llama2_13b": _size(40, 5120, 40, 40, 13824),
    "llama2_70b": _size(80, 8192, 64, 8, 28672),
    "codellama_7b": _size(32, 4096, 32, 32, 11008, vocab=32016, **_CODE),
    "codellama_7b_python": _size(32, 4096, 32, 32, 11008, **_CODE),
    "codellama_13b": _size(40, 5120, 40, 40, 13824, vocab=32016, **_CODE),
    "codellama_13b_python": _size(40, 5120, 40, 40, 13824, **_CODE),
    "codellama_34b": _size(48, 8192, 64, 8, 22016, **_CODE),
    "codellama_70b": _size(80, 8192, 64, 8, 28672, vocab=32016, **_CODE),
    "codellama_70b_instruct": _size(80, 8192, 64, 8, 28672, vocab=32016),
    "llama3_8b": _size(32, 4096, 32, 8, 14336, **_LLAMA3),
    "llama3_70b": _size(80, 8192, 64, 8, 28672, **_LLAMA3),
    "llama3_1_8b": _size(32, 4096, 32, 8, 14336, **_LLAMA31),
    "llama3_1_70b": _size(80, 8192, 64, 8, 28672, **_LLAMA31),
    "llama3_1_405b": _size(126, 16384, 128, 8, 53248, **_LLAMA31),
    "llama3_2_1b": _size(16, 2048, 32, 8, 8192, **_LLAMA32),
    "llama3_2_3b": _size(28, 3072, 24, 8, 8192, **_LLAMA32),
    "yi_6b": _size(32, 4096, 32, 4, 11008, **_YI),
    "yi_9b": _size(48, 4096, 32, 4, 11008, vocab=64000, norm_eps=1e-6),
    "yi_34b": _size(60, 7168, 56, 8, 20480, **_YI),
    "open_llama_1b": _size(22, 2048, 16, 16, 5504, **_LLAMA1),
    "open_llama_3b": _size(26, 3200, 32, 32, 8640, **_LLAMA1),
    "open_llama_7b": _size(32, 4096, 32, 32, 11008, **_LLAMA1),
    "open_llama_13b": _size(40, 5120, 40, 40, 13824, **_LLAMA1),
    "chinese_llama_7b": _size(32, 4096, 32, 32, 11008, **_CHINESE),
    "chinese_llama_13b": _size(40, 5120, 40, 40, 13824, **_CHINESE),
    "chinese_llama_33b": _size(60, 6656, 52, 52, 17920, **_CHINESE),
    "chinese_alpaca_7b": _size(32, 4096, 32, 32, 11008, **_ALPACA),
    "chinese_alpaca_13b": _size(40, 5120, 40, 40, 13824, **_ALPACA),
    "chinese_alpaca_33b": _size(60, 6656, 52, 52, 17920, **_ALPACA),
    "chinese_llama2_7b": _size(32, 4096, 32, 32, 11008, vocab=55296),
    "chinese_llama2_13b": _size(40, 5120, 40, 40, 13824, vocab=55296),
}


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    tensors=TENSORS,
    config=CONFIG | {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={"max_positions": 2048, "norm_eps": 1e-6, "tie_embeddings": False, "qkv_bias": False, "mlp_bias": False},
    only={"hidden_act": "silu", "attention_dropout": 0.0},
    sizes=SIZES,
)

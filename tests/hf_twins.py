"""Tiny random models of transformers of every family and option, and ours with their weights."""

import json
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmpipe.families import FAMILIES, Shape, from_hf_config

VOCAB = 101  # odd, so that the vocabulary's slices differ in size
ORIGINAL = 48
"""max_position_embeddings: shorter than the tests' longest texts, so that the scalings have something to do."""
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": ORIGINAL, "initializer_range": 0.2,
}  # fmt: skip
_FALCON = {
    "model_type": "falcon", "num_attention_heads": 5, "hidden_size": 40, "ffn_hidden_size": 44,
    "intermediate_size": None, "num_key_value_heads": None,
}  # fmt: skip
_FALCON_NEW = _FALCON | {
    "new_decoder_architecture": True, "num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 32
}  # fmt: skip


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-3},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, attention bias": {"attention_bias": True, "num_key_value_heads": 1},
    "llama, mlp bias": {"mlp_bias": True, "num_key_value_heads": 4},
    "llama, heads wider than hidden": {"head_dim": 24},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, linear": _rope("linear", factor=4.0),
    "llama, dynamic": _rope("dynamic", factor=4.0),
    "llama, llama3": _rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL
    ),
    "llama, yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "llama, yarn, no original": _rope("yarn", factor=2.0, attention_factor=1.5, beta_fast=8, beta_slow=2),
    "llama, yarn, mscale": _rope(
        "yarn", factor=4.0, original_max_position_embeddings=20, mscale=0.7, mscale_all_dim=1.2, truncate=False
    ),
    "mistral, window": {"model_type": "mistral", "sliding_window": 7},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, windows from layer 1": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    "falcon 7b": _FALCON,
    "falcon, 4 heads": _FALCON | {"num_attention_heads": 4, "hidden_size": 32},
    "falcon, 71 heads": _FALCON | {"num_attention_heads": 71, "hidden_size": 142, "num_hidden_layers": 1},
    "falcon, all heads": _FALCON | {"multi_query": False, "tie_word_embeddings": False},
    "falcon 40b": _FALCON_NEW | {"tie_word_embeddings": False},
    "falcon 11b": _FALCON_NEW | {"num_ln_in_parallel_attn": 1} | _rope("linear", factor=2.0),
}  # fmt: skip


def theirs(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' model with all its parameters random, biases and norms too."""
    torch.manual_seed(0)
    given = {"model_type": "llama"} | _SIZES | MODELS[name] | changes
    given = {key: value for key, value in given.items() if value is not None or key == "sliding_window"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def shape_of(model: PreTrainedModel) -> Shape:
    """Our shape, read from transformers' own config.json."""
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    return from_hf_config(config)


def in_our_names(tensors: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """transformers' tensors, or gradients by its names, in ours: Falcon's fused q, k, v taken apart."""
    found, family = {}, FAMILIES[shape.family]
    for key, row in family.keys(shape).items():
        whole = tensors[family.hf_name(key, shape)]
        if row.fused:  # transformers' FalconAttention._split_heads
            groups = whole.view(shape.num_kv_heads, -1, shape.head_dim, shape.hidden)
            whole = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}[row.fused].reshape(-1, shape.hidden)
        found[key] = whole
    return found

"""The matrix's models: tiny, random, of every family and option, written by transformers' own save_pretrained."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

VOCAB = 131  # odd and prime, so that the vocabulary's slices differ in size
_SIZES = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 3e-5,
    "initializer_range": 0.05,
}  # fmt: skip
_GQA = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
_FALCON = {
    "model_type": "falcon", "ffn_hidden_size": 60, "alibi": False, "bias": False, "layer_norm_epsilon": 3e-5,
    "intermediate_size": None, "num_key_value_heads": None, "rms_norm_eps": None,
}  # fmt: skip
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rope(kind: str, theta: float = 5e5, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama 8/2": _GQA | _rope("default", 23000.0),
    "llama 6/3": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama 3.1": _GQA | _rope("llama3", factor=8.0, **_LLAMA3) | {"max_position_embeddings": 131072},
    "llama 3.2": _GQA | _rope("llama3", factor=32.0, **_LLAMA3)
    | {"max_position_embeddings": 131072, "tie_word_embeddings": True},
    "codellama": _rope("default", 1e6) | {"vocab_size": 137, "max_position_embeddings": 16384},
    "tied": _GQA | {"tie_word_embeddings": True},
    "linear": _GQA | _rope("linear", factor=4.0),
    "dynamic": _GQA | _rope("dynamic", factor=4.0),
    "yarn": _GQA | _rope("yarn", factor=4.0, original_max_position_embeddings=128),
    "biases": _GQA | {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 2},
    "extended": {"vocab_size": 259},  # more than 128 rows beyond a padded vocabulary's first step
    "mistral": _GQA | _rope("default", 1e6) | {"model_type": "mistral", "sliding_window": None},
    "mistral window": _GQA | {"model_type": "mistral", "sliding_window": 17},
    "falcon 71/1": _FALCON | {"hidden_size": 142, "num_attention_heads": 71, "num_hidden_layers": 2,
                              "multi_query": True, "parallel_attn": True},
    "falcon new decoder": _FALCON | {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2,
                                     "new_decoder_architecture": True},
    "qwen2": _GQA | _rope("default", 1e6) | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 window": _GQA | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 19,
                            "max_window_layers": 1},
    "qwen3": _GQA | _rope("default", 1e6) | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3 untied": _GQA | {"model_type": "qwen3", "head_dim": 8},
}  # fmt: skip


def make_model(name: str, **changes: Any) -> Any:
    """transformers' model with every parameter random: ones and zeros would hide a swap of norms or biases."""
    torch.manual_seed(3)
    given = {key: value for key, value in (_SIZES | MODELS[name] | changes).items()
             if value is not None or key == "sliding_window"}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(name: str, path: Path, dtype: torch.dtype = torch.float32, **given: Any) -> Path:
    """The model as transformers writes it; `given`: to save_pretrained."""
    make_model(name).to(dtype).save_pretrained(path, **given)
    return path


@torch.inference_mode()
def transformers_logits(path: Path, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, T, V) in fp32 by transformers' whole model, each row alone: dynamic scaling looks at a batch's longest."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = zip(tokens[:, None], positions[:, None], strict=True)
    every = torch.ones_like(tokens[:1])
    return torch.cat([model(row, position_ids=at, attention_mask=every).logits for row, at in rows])

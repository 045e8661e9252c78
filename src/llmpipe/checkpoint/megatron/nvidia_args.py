"""Megatron-LM's training arguments, as far as they say what a model is: read into a shape, and written from one."""

import logging
from argparse import Namespace
from typing import Any

import torch

from llmpipe.checkpoint.megatron.dialect import Written, fields_of
from llmpipe.errors import UserError
from llmpipe.families import Shape

log = logging.getLogger(__name__)

OUTER: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 1, "num_floating_point_operations_so_far": 0}
UNCERTAIN = ("rope_theta", "rope_scaling")
"""Its own converter leaves them at their defaults (loader_llama_mistral.py:291); its legacy model never reads them."""

# The arguments whose other values are other arithmetic than the decoder's; those that are missing are older than it.
_ONLY: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0, 1),
    "num_experts": (None, 0),
    "multi_latent_attention": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "no_rope_freq": (None,),
    "window_attn_skip_freq": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
}
# Fields of `Shape` and their arguments, the newer name first.
_FIELDS = {
    "num_layers": ("num_layers",),
    "hidden": ("hidden_size",),
    "num_heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "max_positions": ("max_position_embeddings",),
    "norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "rope_theta": ("rotary_base",),
    "vocab": ("vocab_size",),
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_FACTOR = 8.0


def read_args(args: Namespace | None) -> dict[str, Any]:
    """See `Dialect.read_args`."""
    given = fields_of(args)
    if "causal_lm" in given:
        raise UserError(
            "its args are those of alibaba's Megatron-LLaMA, trained without --causal-lm: llmpipe does not read that"
            " kind, whose rows of q, k and v stand in another order than its names tell"
        )
    if given.get("use_rotary_position_embeddings"):  # the name before position_embedding_type
        given["position_embedding_type"] = "rope"
    for name, known in _ONLY.items():
        if name in given and given[name] not in known:
            raise UserError(
                f"its args say {name} {given[name]!r}: llmpipe computes {' or '.join(map(repr, known))} only"
            )
    found = {
        field: next(given[name] for name in names if given.get(name) is not None)
        for field, names in _FIELDS.items()
        if any(given.get(name) is not None for name in names)
    }
    return found | _floats(found) | _kv_heads(given) | _switches(given) | _rope(given)


def _floats(found: dict[str, Any]) -> dict[str, Any]:
    return {name: float(found[name]) for name in ("norm_eps", "rope_theta") if name in found}


def _kv_heads(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("group_query_attention"):
        return {"num_kv_heads": given["num_query_groups"]}
    return {"num_kv_heads": given["num_attention_heads"]} if "num_attention_heads" in given else {}


def _switches(given: dict[str, Any]) -> dict[str, Any]:
    """What is there or not; an argument that is missing is older than the switch."""
    if not given:
        return {}
    biases = bool(given["add_bias_linear"]) if "add_bias_linear" in given else None
    linear = {"qkv_bias": biases or bool(given.get("add_qkv_bias")), "output_bias": biases, "mlp_bias": biases}
    return (linear if biases is not None else {}) | {
        "qk_norm": bool(given.get("qk_layernorm")),
        "tie_embeddings": not given.get("untie_embeddings_and_output_weights", False),
        "layernorm_1p": bool(given.get("apply_layernorm_1p")),
        "interleaved": bool(given.get("rotary_interleaved")),
        **_window(given),
    }


def _window(given: dict[str, Any]) -> dict[str, Any]:
    """Nothing where the args know no window, as in 2024: the loader of Llama and Mistral loses it without a word."""
    if "window_size" not in given:
        return {}
    size = given["window_size"]  # so many before a token, beside itself; -1: all
    return {"window": size[0] + 1 if size and size[0] >= 0 else None}


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    if given.get("use_rope_scaling"):
        return {"rope_scaling": _LLAMA3 | {"factor": float(given.get("rope_scaling_factor", _FACTOR))}}
    factor = given.get("rotary_seq_len_interpolation_factor")
    return {"rope_scaling": None if factor in (None, 1) else {"rope_type": "linear", "factor": float(factor)}}


def write_core_args(shape: Shape, written: Written) -> Namespace:
    """The args of a megatron.core model."""
    return _write(shape, written, {"use_legacy_models": False, "transformer_impl": "transformer_engine"})


def write_legacy_args(shape: Shape, written: Written) -> Namespace:
    """The args of a legacy model; UserError for what it has no arithmetic for."""
    if shape.window is not None or (shape.rope_scaling or {"rope_type": "linear"})["rope_type"] != "linear":
        raise UserError(
            f"Megatron-LM's legacy model knows no window and no rope scaling but linear; this one has window"
            f" {shape.window} and {shape.rope_scaling}: write --dialect mcore"
        )
    if shape.rope_theta != 1e4:
        log.warning(
            "Megatron-LM's legacy model takes 10000 for rope theta, whatever its args say (language_model.py); this"
            " model has %g: --dialect mcore computes it",
            shape.rope_theta,
        )
    return _write(shape, written, {"use_legacy_models": True, "transformer_impl": "local"})


def _write(shape: Shape, written: Written, model: dict[str, Any]) -> Namespace:
    if shape.window and shape.window_from:
        raise UserError(f"Megatron-LM has no window from layer {shape.window_from} on: convert with --to hf")
    biases = (shape.qkv_bias, shape.output_bias, shape.mlp_bias)
    if biases not in ((False,) * 3, (True, False, False), (True,) * 3):
        raise UserError(
            "Megatron-LM has biases on all linear layers, on q, k and v alone, or on none; this model has them on"
            f" {'q, k, v' if shape.qkv_bias else ''} {'o' if shape.output_bias else ''}"
            f" {'the MLP' if shape.mlp_bias else ''}: convert with --to hf"
        )
    return Namespace(
        num_layers=shape.num_layers,
        encoder_num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.num_heads,
        kv_channels=shape.head_dim,
        group_query_attention=True,
        num_query_groups=shape.num_kv_heads,
        seq_length=shape.max_positions,
        encoder_seq_length=shape.max_positions,
        max_position_embeddings=shape.max_positions,
        add_position_embedding=True,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        swiglu=True,
        add_bias_linear=shape.output_bias,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        window_size=(shape.window - 1, 0) if shape.window else None,
        untie_embeddings_and_output_weights=not shape.tie_embeddings,
        num_experts=None,
        multi_latent_attention=False,
        **_rope_args(shape),
        **_layout_args(shape, written),
        **_training_args(shape, written),
        **model,
    )


def _rope_args(shape: Shape) -> dict[str, Any]:
    scaling = dict(shape.rope_scaling or {"rope_type": "default"})
    kind, factor = scaling["rope_type"], float(scaling.pop("factor", 1))
    if kind not in ("default", "linear") and scaling != _LLAMA3:
        raise UserError(f"Megatron-LM cannot say the rope scaling {shape.rope_scaling}: convert with --to hf")
    return {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "rotary_base": int(shape.rope_theta) if shape.rope_theta.is_integer() else shape.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": factor if kind == "linear" else None,
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": factor if kind == "llama3" else _FACTOR,
    }


def _layout_args(shape: Shape, written: Written) -> dict[str, Any]:
    """Ranks and stages; uneven ones differ in the first and the last alone."""
    layers, virtual = written.stages.layers, written.vp > 1
    if layers and (virtual or len(set(layers[1:-1])) > 1):
        raise UserError(
            f"pp-layers {','.join(map(str, layers))}: Megatron-LM's stages hold equally many layers, but the first and"
            " the last, and have no uneven virtual stages"
        )
    return {
        "tensor_model_parallel_size": written.tp,
        "pipeline_model_parallel_size": written.pp,
        "virtual_pipeline_model_parallel_size": written.vp if virtual else None,
        "num_layers_per_virtual_pipeline_stage": shape.num_layers // (written.pp * written.vp) if virtual else None,
        "decoder_first_pipeline_num_layers": layers[0] if layers else None,
        "decoder_last_pipeline_num_layers": layers[-1] if layers else None,
        "world_size": written.tp * written.pp,
    }


def _training_args(shape: Shape, written: Written) -> dict[str, Any]:
    """Types, the vocabulary, and what Megatron-LM's loaders ask for though it says nothing of the weights."""
    return {
        "params_dtype": written.dtype,
        "fp16": written.dtype is torch.float16,
        "bf16": written.dtype is torch.bfloat16,
        "make_vocab_size_divisible_by": written.vocab_multiple,
        "padded_vocab_size": written.padded_vocab,
        "vocab_size": shape.vocab,
        "tokenizer_type": "HuggingFaceTokenizer",
        "apply_query_key_layer_scaling": False,
        "sequence_parallel": False,
        "bert_binary_head": True,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }

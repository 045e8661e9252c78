"""Megatron-LLM (epfLLM): Llama, Mistral and Falcon, q and k in Meta's interleaved rotary order, up above gate.

Its converter and its training write different names (`transformer`, `attention`; `encoder`, `self_attention`), which
it reads both; written is what training writes. The converters' digests are in docs/proof/megatron_llm.json.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch

from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect, Written, fields_of
from llmpipe.errors import UserError
from llmpipe.families import Shape

# Arguments whose other values are other arithmetic than the decoder's; a converter's file leaves most of them out.
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rotary",),
    "apply_residual_connection_post_layernorm": (False,),
    "use_post_ln": (False,),
    "use_bias": (False,),
}
_FIELDS = {
    "num_layers": "num_layers",
    "hidden": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn": "ffn_hidden_size",
    "max_positions": "max_position_embeddings",
    "vocab": "vocab_size",  # ours alone
}
# PositionEmbeddingType in training's args.
_POSITIONS = {1: "rotary", 2: "absolute"}


def read_args(args: Any) -> dict[str, Any]:
    """See `Dialect.read_args`; what a file leaves out is the default of Megatron-LLM's command line."""
    given = fields_of(args)
    if not given:
        return {}
    _check(given)
    factor = float(given.get("rope_scaling_factor") or 1)
    return {
        **{field: given[name] for field, name in _FIELDS.items() if given.get(name) is not None},
        "num_kv_heads": given.get("num_attention_heads_kv") or given["num_attention_heads"],
        "head_dim": given.get("kv_channels") or given["hidden_size"] // given["num_attention_heads"],
        "norm_eps": float(given.get("layernorm_epsilon") or 1e-5),
        "rope_theta": float(given.get("rope_theta") or 1e4),
        "rope_scaling": None if factor == 1 else {"rope_type": "linear", "factor": factor},
        "window": given.get("sliding_window_size"),
        "tie_embeddings": bool(given.get("tie_embed_logits", True)),
        **_family(given),
    }


def _family(given: dict[str, Any]) -> dict[str, Any]:
    """Falcon by its parallel attention; Mistral by its name in training's args, where the window does not tell."""
    if given.get("parallel_attn"):
        ffn = given.get("ffn_hidden_size") or 4 * given["hidden_size"]
        return {"family": "falcon", "ffn": ffn, "layer_norms": 2 if given.get("parallel_layernorm") else 1}
    return {"family": "mistral"} if given.get("model_name") == "mistral" else {}


def _check(given: dict[str, Any]) -> None:
    """UserError for a model that is none of the three."""
    member = getattr(given.get("position_embedding_type"), "args", None)  # what stands in for the enumeration's
    if member:
        given["position_embedding_type"] = _POSITIONS.get(member[0], member[0])
    falcon = bool(given.get("parallel_attn"))
    only = _ONLY | {"glu_activation": (None,) if falcon else ("swiglu",), "use_rms_norm": (not falcon,)}
    for name, known in only.items():
        if name in given and given[name] not in known:
            raise UserError(
                f"its args say {name} {given[name]!r}: llmpipe computes {' or '.join(map(repr, known))} only"
                f" where parallel_attn is {falcon}"
            )


def write_args(shape: Shape, written: Written) -> Namespace:
    """What its loader, its checkpoint_util.py and its exporter read; UserError for what it cannot compute."""
    _check_shape(shape, written)
    falcon = shape.family == "falcon"
    return Namespace(
        num_layers=shape.num_layers,
        encoder_num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.num_heads,
        num_attention_heads_kv=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        seq_length=shape.max_positions,
        max_position_embeddings=shape.max_positions,
        position_embedding_type="rotary",
        rope_theta=shape.rope_theta,
        rope_scaling_factor=float((shape.rope_scaling or {"factor": 1})["factor"]),
        sliding_window_size=shape.window,
        layernorm_epsilon=shape.norm_eps,
        use_rms_norm=not falcon,
        glu_activation=None if falcon else "swiglu",
        parallel_attn=falcon,
        parallel_layernorm=falcon and shape.layer_norms == 2,
        tie_embed_logits=shape.tie_embeddings,
        **_training_args(shape, written),
    )


def _training_args(shape: Shape, written: Written) -> dict[str, Any]:
    """The layout, the type, and what the loader asks for though it says nothing of the weights."""
    falcon, vp = shape.family == "falcon", written.vp if written.vp > 1 else None
    return {
        "model_name": {"llama": "llama2"}.get(shape.family, shape.family),
        "iteration": "release",
        "tensor_model_parallel_size": written.tp,
        "pipeline_model_parallel_size": written.pp,
        "virtual_pipeline_model_parallel_size": vp,
        "num_layers_per_virtual_pipeline_stage": shape.num_layers // (written.pp * vp) if vp else None,
        "params_dtype": written.dtype,
        "fp16": written.dtype is torch.float16,
        "bf16": written.dtype is torch.bfloat16,
        "make_vocab_size_divisible_by": written.vocab_multiple,
        "padded_vocab_size": written.padded_vocab,
        "vocab_size": shape.vocab,
        "tokenizer_type": "FalconTokenizer" if falcon else "SentencePieceTokenizer",
        "use_flash_attn": falcon or shape.window is not None,  # its other attention knows no window
        "use_bias": False,
        "use_post_ln": False,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "lima_dropout": False,
        "bias_gelu_fusion": False,
        "bias_dropout_fusion": False,
        "data_parallel_random_init": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }


def _check_shape(shape: Shape, written: Written) -> None:
    falcon = shape.family == "falcon"
    cannot = {
        f"stages of {', '.join(map(str, written.stages.layers))} layers, but equal ones": bool(written.stages.layers),
        "heads of other sizes than hidden / heads": shape.head_dim * shape.num_heads != shape.hidden,
        f"rope scaling {shape.rope_scaling}": (shape.rope_scaling or {"rope_type": "linear"})["rope_type"] != "linear",
        "biases": shape.qkv_bias or shape.output_bias or shape.mlp_bias,
        "Llama whose head is its embedding": shape.tie_embeddings and not falcon,
        "Falcon whose head is not its embedding": falcon and not shape.tie_embeddings,
    }
    if found := [what for what, is_so in cannot.items() if is_so]:
        raise UserError(f"Megatron-LLM knows no {'; no '.join(found)}: convert to another dialect, or with --to hf")


_LAYER = "language_model.encoder.layers.{}"
_FALCON = {
    "layers.{}.attention_norm.bias": f"{_LAYER}.input_layernorm.bias",
    "layers.{}.mlp_norm.weight": f"{_LAYER}.mlp_layernorm.weight",
    "layers.{}.mlp_norm.bias": f"{_LAYER}.mlp_layernorm.bias",
    "layers.{}.mlp.up.weight": f"{_LAYER}.mlp.dense_h_to_4h.weight",
    "norm.bias": "language_model.encoder.final_layernorm.bias",
}
EPF = Dialect(
    name="epf",
    system="Megatron-LLM",
    names={
        "embedding.weight": "language_model.embedding.word_embeddings.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}.input_layernorm.weight",
        f"{QKV}.weight": f"{_LAYER}.self_attention.query_key_value.weight",
        "layers.{}.attention.o.weight": f"{_LAYER}.self_attention.dense.weight",
        "layers.{}.mlp_norm.weight": f"{_LAYER}.post_attention_layernorm.weight",
        f"{GATE_UP}.weight": f"{_LAYER}.mlp.dense_h_to_4h.weight",
        "layers.{}.mlp.down.weight": f"{_LAYER}.mlp.dense_4h_to_h.weight",
        "norm.weight": "language_model.encoder.final_layernorm.weight",
        "head.weight": "language_model.lm_head",
    },
    family_names={"falcon": _FALCON},
    aliases=(  # hf_to_megatron.py
        (r"^language_model\.transformer\.", "language_model.encoder."),
        (r"(\.layers\.\d+)\.attention\.", r"\1.self_attention."),
    ),
    marks=(r"^language_model\..*\.query_key_value\.weight$",),
    unlike=(r"rmsnorm", r"output_layer", r"^lm_head", r"(input|post_attention|final)_norm\."),
    args_marks=("num_attention_heads_kv", "glu_activation", "parallel_attn"),
    families=("llama", "mistral", "falcon"),
    interleaved=True,
    gate_first=False,
    tied_head="word_embeddings_for_head.weight",
    tables=(
        "language_model",
        "language_model.embedding",
        "language_model.embedding.word_embeddings",
        "language_model.encoder",
        "word_embeddings_for_head",
    ),
    outer={"checkpoint_version": 3.0, "iteration": "release"},
    read_args=read_args,
    uncertain=("norm_eps", "rope_theta", "rope_scaling"),  # hf_to_megatron.py:334, checkpoint_saver_megatron.py:93
    write_args=write_args,
)
# Checkpoints of before August 2023 (commit c504227), whose q and k are in half-split order: its permute_qkv.py upgrades
# them. Nothing in the files tells, so the user has to.
EPF_OLD = replace(
    EPF, name="epf-old", system="Megatron-LLM before permute_qkv.py", interleaved=False, by_name_only=True
)

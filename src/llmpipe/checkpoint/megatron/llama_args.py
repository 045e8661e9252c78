"""The arguments of both Megatron-LLaMAs, alibaba's and MinfanZhao's, read and written.

Both compute one kind of model: rotary embeddings of theta 10000 without scaling, RMSNorm, SwiGLU, no biases, as many KV
heads as query heads. Neither has an argument for theta.
"""

import logging
from argparse import Namespace
from typing import Any

from llmpipe.checkpoint.megatron.dialect import Written, fields_of
from llmpipe.errors import UserError
from llmpipe.families import Shape

log = logging.getLogger(__name__)

THETA = 1e4
UNCERTAIN = ("rope_theta",)
"""A constant in both's code, whatever model their converters are given."""
OUTER = {"checkpoint_version": 3.0, "iteration": 0}
# Arguments, where they are there, with the only value that the decoder computes.
_ONLY = {
    "swiglu": True,
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_percent": 1.0,
}


def read_common(args: Namespace | None, only: dict[str, Any], system: str) -> dict[str, Any]:
    """What both say in the same words (see `Dialect.read_args`); `only`: a fork's own arguments that have one value."""
    fixed = {"rope_theta": THETA, "rope_scaling": None, "window": None, "qk_norm": False, "tie_embeddings": False}
    fixed |= {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
    given = fields_of(args)
    if not given:
        return fixed
    wrong = [f"{name} {given[name]!r}" for name, value in (_ONLY | only).items() if given.get(name, value) != value]
    if wrong:
        raise UserError(f"the args of {system} say {', '.join(wrong)}, which llmpipe does not compute")
    hidden, heads = given.get("hidden_size"), given.get("num_attention_heads")
    found = {
        "num_layers": given.get("num_layers"),
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": given.get("kv_channels") or (hidden // heads if hidden and heads else None),
        "ffn": given.get("ffn_hidden_size"),
        "vocab": given.get("orig_vocab_size"),
        "max_positions": given.get("max_position_embeddings"),
        "rope_theta": given.get("rotary_base"),  # in our own files
        "layernorm_1p": given.get("apply_layernorm_1p"),
    }
    return fixed | {name: value for name, value in found.items() if value is not None}


def write_common(shape: Shape, written: Written, system: str) -> Namespace:
    """The arguments that both have; UserError for a model that neither computes."""
    _check(shape, written, system)
    if shape.rope_theta != THETA:
        log.warning(
            "%s takes %g for rope theta and has no argument for it; this model has %g, which stands in rotary_base:"
            " its code has to be changed",
            system,
            THETA,
            shape.rope_theta,
        )
    return Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        max_position_embeddings=shape.max_positions,
        seq_length=shape.max_positions,
        rotary_base=shape.rope_theta,
        apply_layernorm_1p=False,
        orig_vocab_size=shape.vocab,
        padded_vocab_size=written.padded_vocab,
        make_vocab_size_divisible_by=written.vocab_multiple,
        tensor_model_parallel_size=written.tp,
        pipeline_model_parallel_size=written.pp,
        virtual_pipeline_model_parallel_size=written.vp if written.vp > 1 else None,
        data_parallel_size=1,
        rank=0,
        params_dtype=written.dtype,
        untie_embeddings_and_output_weights=not shape.tie_embeddings,
        **_ONLY,
    )


def _check(shape: Shape, written: Written, system: str) -> None:
    cannot = {
        f"{shape.num_kv_heads} KV heads for {shape.num_heads} query heads": shape.num_kv_heads != shape.num_heads,
        "biases": shape.qkv_bias or shape.output_bias or shape.mlp_bias,
        "norms of q and k": shape.qk_norm,
        f"window of {shape.window} tokens": shape.window is not None,
        f"rope scaling {shape.rope_scaling}": shape.rope_scaling is not None,
        f"stages of {written.stages.layers} layers": bool(written.stages.layers),
    }
    found = [what for what, there in cannot.items() if there]
    if found:
        raise UserError(f"{system} has no {'; no '.join(found)}, which this was to have: write another format")

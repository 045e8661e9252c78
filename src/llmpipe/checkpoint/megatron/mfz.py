"""MinfanZhao/Megatron-LM_, branch llama-sft: Meta's rotary order (--rope-style llama), norms that are called rmsnorm.

Its converter (docs/proof/megatron_llama_mfz.json) goes through Meta's .pth, pads the vocabulary with zeros and writes
None for the args: such files say nothing of the shape. What is written here has args, which its training ignores with
--finetune and else compares with its own.
"""

from argparse import Namespace
from typing import Any

from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect, Written, fields_of
from llmpipe.checkpoint.megatron.llama_args import OUTER, UNCERTAIN, read_common, write_common
from llmpipe.families import Shape

_SYSTEM = "MinfanZhao's Megatron-LLaMA"
_ONLY = {"use_rmsnorm": True, "localsize": None, "gate_gelu": False, "apply_residual_connection_post_norm": False}
_LAYER = "language_model.encoder.layers.{}"


def _read_args(args: Namespace | None) -> dict[str, Any]:
    found = read_common(args, _ONLY, _SYSTEM)
    given = fields_of(args)
    if "rmsnorm_epsilon" in given:
        found["norm_eps"] = given["rmsnorm_epsilon"]
    if "rope_style" in given:  # "megatron", its default: half after half, in models that began there
        found["interleaved"] = given["rope_style"] == "llama"
    return found | {"tie_embeddings": not given.get("untie_embeddings_and_output_weights", True)}


def _write_args(shape: Shape, written: Written) -> Namespace:
    args = write_common(shape, written, _SYSTEM)
    vars(args).update(
        use_rmsnorm=True,
        rmsnorm_epsilon=shape.norm_eps,
        llama_swiglu=True,
        rope_style="llama",
        tokenizer_type="LLaMASentencePieceTokenizer",
    )
    return args


MFZ = Dialect(
    name="mfz",
    system=_SYSTEM,
    names={
        "embedding.weight": "language_model.embedding.word_embeddings.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}.input_rmsnorm.weight",
        f"{QKV}.weight": f"{_LAYER}.self_attention.query_key_value.weight",
        "layers.{}.attention.o.weight": f"{_LAYER}.self_attention.dense.weight",
        "layers.{}.mlp_norm.weight": f"{_LAYER}.post_attention_rmsnorm.weight",
        f"{GATE_UP}.weight": f"{_LAYER}.mlp.dense_h_to_4h.weight",
        "layers.{}.mlp.down.weight": f"{_LAYER}.mlp.dense_4h_to_h.weight",
        "norm.weight": "language_model.encoder.final_rmsnorm.weight",
        "head.weight": "language_model.output_layer.weight",
    },
    marks=(r"\.(input|post_attention|final)_rmsnorm\.weight$",),
    args_marks=("rope_style",),
    families=("llama",),
    interleaved=True,
    padding="zeros",
    tied_head="word_embeddings_for_head.weight",
    tables=(
        "language_model",
        "language_model.embedding",
        "language_model.embedding.word_embeddings",
        "language_model.encoder",
        "language_model.output_layer",
        "word_embeddings_for_head",
    ),
    outer=OUTER,
    read_args=_read_args,
    uncertain=UNCERTAIN,
    write_args=_write_args,
)

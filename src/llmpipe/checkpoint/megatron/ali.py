"""alibaba/Megatron-LLaMA with --causal-lm, as its scripts train: q, k, v in blocks, the head whole in each tensor rank.

Its converter (docs/proof/megatron_llama_ali.json) writes the head in true rows, which its own model, made for the
padded vocabulary, refuses to load where the two differ; what is written here has padded rows, what is read may have
either. It writes no norm eps. Training saves the same tensors, and with --distributed-checkpointing the same files in
folders mp_rank_TT[_PPP]_dp_000.
"""

from argparse import Namespace
from typing import Any

from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect, Written, fields_of
from llmpipe.checkpoint.megatron.llama_args import OUTER, UNCERTAIN, read_common, write_common
from llmpipe.errors import UserError
from llmpipe.families import Shape

_SYSTEM = "alibaba's Megatron-LLaMA"
_LAYER = "language_model.encoder.layers.{}"


def _read_args(args: Namespace | None) -> dict[str, Any]:
    found = read_common(args, {"RMSNorm": True, "causal_lm": True}, _SYSTEM)
    eps = fields_of(args).get("layernorm_epsilon")
    return found if eps is None else found | {"norm_eps": eps}


def _write_args(shape: Shape, written: Written) -> Namespace:
    if shape.tie_embeddings:
        raise UserError(f"{_SYSTEM} cannot tie the head to the embedding, as this model does: write another format")
    args = write_common(shape, written, _SYSTEM)
    vars(args).update(RMSNorm=True, causal_lm=True, layernorm_epsilon=shape.norm_eps, tokenizer_type="PretrainedFromHF")
    args.untie_embeddings_and_output_weights = False  # what --causal-lm's own scripts leave it at
    return args


ALI = Dialect(
    name="ali",
    system=_SYSTEM,
    names={
        "embedding.weight": "language_model.embedding.word_embeddings.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}.input_layernorm.weight",
        f"{QKV}.weight": f"{_LAYER}.self_attention.query_key_value.weight",
        "layers.{}.attention.o.weight": f"{_LAYER}.self_attention.dense.weight",
        "layers.{}.mlp_norm.weight": f"{_LAYER}.post_attention_layernorm.weight",
        f"{GATE_UP}.weight": f"{_LAYER}.mlp.dense_h_to_4h.weight",
        "layers.{}.mlp.down.weight": f"{_LAYER}.mlp.dense_4h_to_h.weight",
        "norm.weight": "language_model.encoder.final_layernorm.weight",
        "head.weight": "lm_head.weight",
    },
    marks=(r"^lm_head\.weight$", r"^language_model\.encoder\."),
    args_marks=("causal_lm",),
    families=("llama",),
    qkv="blocks",
    whole_head=True,
    tables=(
        "language_model",
        "language_model.embedding",
        "language_model.embedding.word_embeddings",
        "language_model.encoder",
        "lm_head",
    ),
    outer=OUTER,
    read_args=_read_args,
    uncertain=UNCERTAIN,
    write_args=_write_args,
)

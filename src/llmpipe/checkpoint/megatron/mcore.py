"""Megatron-LM's GPT model of megatron.core, the default since 2024: flat names, as its Transformer Engine layers give.

The norms stand within the linear layers that they feed. Without Transformer Engine (--transformer-impl local) they are
modules of their own; torch_dist directories have the first names always.
"""

from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect
from llmpipe.checkpoint.megatron.nvidia_args import OUTER, UNCERTAIN, read_args, write_core_args

_LAYER = "decoder.layers.{}"
MCORE = Dialect(
    name="mcore",
    system="Megatron-LM's megatron.core model",
    names={
        "embedding.weight": "embedding.word_embeddings.weight",
        "layers.{}.attention_norm.weight": f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        f"{QKV}.weight": f"{_LAYER}.self_attention.linear_qkv.weight",
        f"{QKV}.bias": f"{_LAYER}.self_attention.linear_qkv.bias",
        "layers.{}.attention.q_norm.weight": f"{_LAYER}.self_attention.q_layernorm.weight",
        "layers.{}.attention.k_norm.weight": f"{_LAYER}.self_attention.k_layernorm.weight",
        "layers.{}.attention.o.weight": f"{_LAYER}.self_attention.linear_proj.weight",
        "layers.{}.attention.o.bias": f"{_LAYER}.self_attention.linear_proj.bias",
        "layers.{}.mlp_norm.weight": f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        f"{GATE_UP}.weight": f"{_LAYER}.mlp.linear_fc1.weight",
        f"{GATE_UP}.bias": f"{_LAYER}.mlp.linear_fc1.bias",
        "layers.{}.mlp.down.weight": f"{_LAYER}.mlp.linear_fc2.weight",
        "layers.{}.mlp.down.bias": f"{_LAYER}.mlp.linear_fc2.bias",
        "norm.weight": "decoder.final_layernorm.weight",
        "head.weight": "output_layer.weight",
    },
    aliases=(
        (r"\.input_layernorm\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
        (r"\.pre_mlp_layernorm\.weight$", ".mlp.linear_fc1.layer_norm_weight"),
    ),
    marks=(r"^decoder\.layers\.",),
    families=("llama", "mistral", "qwen2", "qwen3"),
    tied_head="output_layer.weight",
    empty=tuple(
        f"{_LAYER}.{linear}._extra_state"  # Transformer Engine's, of its 8-bit types
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ),
    outer=OUTER,
    folder="iter_0000001",
    read_args=read_args,
    uncertain=UNCERTAIN,
    write_args=write_core_args,
)

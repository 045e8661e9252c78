"""Llama: RMSNorm, rotary embeddings, SwiGLU, grouped queries. Llama 1 to 3.2, CodeLlama, Yi, OpenLLaMA, and all alike.

Sizes are the published config.json's.
"""

from llmpipe.families.family import Family, Shape, Tensor

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


def _size(num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, ffn: int, vocab: int = 32000) -> Shape:
    return Shape(
        family="llama",
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden // num_heads,
        ffn=ffn,
        vocab=vocab,
        max_positions=4096,
        norm_eps=1e-5,
        rope_theta=1e4,
    )


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    tensors=TENSORS,
    config=CONFIG | {"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    defaults={"max_positions": 2048, "norm_eps": 1e-6, "tie_embeddings": False, "qkv_bias": False, "mlp_bias": False},
    only={"hidden_act": "silu", "attention_dropout": 0.0},
    sizes={
        "llama2_7b": _size(32, 4096, 32, 32, 11008),
        "llama2_13b": _size(40, 5120, 40, 40, 13824),
        "llama2_70b": _size(80, 8192, 64, 8, 28672),
    },
)

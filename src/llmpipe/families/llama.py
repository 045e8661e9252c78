"""Llama: RMSNorm, rotary embeddings, SwiGLU, grouped queries. Llama 1, 2 and everything of their shape."""

from llmpipe.families.family import Family, Shape, Tensor


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
    tensors=(
        Tensor("embedding.weight", "model.embed_tokens.weight", ("vocab", "hidden"), 0),
        Tensor("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", ("hidden",), None),
        Tensor("layers.{}.attention.q.weight", "model.layers.{}.self_attn.q_proj.weight", ("q", "hidden"), 0),
        Tensor("layers.{}.attention.k.weight", "model.layers.{}.self_attn.k_proj.weight", ("kv", "hidden"), 0),
        Tensor("layers.{}.attention.v.weight", "model.layers.{}.self_attn.v_proj.weight", ("kv", "hidden"), 0),
        Tensor("layers.{}.attention.o.weight", "model.layers.{}.self_attn.o_proj.weight", ("hidden", "q"), 1),
        Tensor("layers.{}.mlp_norm.weight", "model.layers.{}.post_attention_layernorm.weight", ("hidden",), None),
        Tensor("layers.{}.mlp.gate.weight", "model.layers.{}.mlp.gate_proj.weight", ("ffn", "hidden"), 0),
        Tensor("layers.{}.mlp.up.weight", "model.layers.{}.mlp.up_proj.weight", ("ffn", "hidden"), 0),
        Tensor("layers.{}.mlp.down.weight", "model.layers.{}.mlp.down_proj.weight", ("hidden", "ffn"), 1),
        Tensor("norm.weight", "model.norm.weight", ("hidden",), None),
        Tensor("head.weight", "lm_head.weight", ("vocab", "hidden"), 0),
    ),
    first=("embedding.weight",),
    last=("norm.weight", "head.weight"),
    sizes={
        "llama2_7b": _size(32, 4096, 32, 32, 11008),
        "llama2_13b": _size(40, 5120, 40, 40, 13824),
        "llama2_70b": _size(80, 8192, 64, 8, 28672),
    },
)

"""Falcon: LayerNorm, attention and MLP side by side, GELU, one or few KV heads, tied embeddings. arXiv:2311.16867.

7B: one KV head and one norm a layer. 40B and 180B ("new decoder architecture"): KV heads shared by groups, two norms.
The checkpoint keeps q, k and v fused, KV head by KV head: its query heads, then K, then V.
"""

from functools import partial

from llmpipe.families.family import Family, Tensor
from llmpipe.families.sizes import sized

_LAYER, _HF = "layers.{}", "transformer.h.{}"
_SHARED = f"{_HF}.input_layernorm"
_QKV = f"{_HF}.self_attention.query_key_value.weight"
_size = partial(sized, "falcon", head_dim=64, vocab=65024, max_positions=2048, tie_embeddings=True)
FALCON = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    norm="layer",
    mlp="gelu",
    parallel=True,
    tensors=(
        Tensor("embedding.weight", "transformer.word_embeddings.weight", ("vocab", "hidden"), 0),
        Tensor(f"{_LAYER}.attention_norm.weight", f"{_SHARED}.weight", ("hidden",), None, when="shared_norm"),
        Tensor(f"{_LAYER}.attention_norm.bias", f"{_SHARED}.bias", ("hidden",), None, when="shared_norm"),
        Tensor(f"{_LAYER}.attention_norm.weight", f"{_HF}.ln_attn.weight", ("hidden",), None, when="mlp_norm"),
        Tensor(f"{_LAYER}.attention_norm.bias", f"{_HF}.ln_attn.bias", ("hidden",), None, when="mlp_norm"),
        Tensor(f"{_LAYER}.attention.q.weight", _QKV, ("q", "hidden"), 0, fused="q"),
        Tensor(f"{_LAYER}.attention.k.weight", _QKV, ("kv", "hidden"), 0, fused="k"),
        Tensor(f"{_LAYER}.attention.v.weight", _QKV, ("kv", "hidden"), 0, fused="v"),
        Tensor(f"{_LAYER}.attention.o.weight", f"{_HF}.self_attention.dense.weight", ("hidden", "q"), 1),
        Tensor(f"{_LAYER}.mlp_norm.weight", f"{_HF}.ln_mlp.weight", ("hidden",), None, when="mlp_norm"),
        Tensor(f"{_LAYER}.mlp_norm.bias", f"{_HF}.ln_mlp.bias", ("hidden",), None, when="mlp_norm"),
        Tensor(f"{_LAYER}.mlp.up.weight", f"{_HF}.mlp.dense_h_to_4h.weight", ("ffn", "hidden"), 0),
        Tensor(f"{_LAYER}.mlp.down.weight", f"{_HF}.mlp.dense_4h_to_h.weight", ("hidden", "ffn"), 1),
        Tensor("norm.weight", "transformer.ln_f.weight", ("hidden",), None),
        Tensor("norm.bias", "transformer.ln_f.bias", ("hidden",), None),
        Tensor("head.weight", "lm_head.weight", ("vocab", "hidden"), 0),
    ),
    config={
        "num_layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_kv_heads",
        "ffn": "ffn_hidden_size",
        "vocab": "vocab_size",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={"max_positions": 2048, "norm_eps": 1e-5, "tie_embeddings": True},
    only={
        "activation": "gelu", "alibi": False, "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0, "bias": False, "hidden_dropout": 0.0, "parallel_attn": True,
    },
    sizes={  # num_layers, hidden, num_heads, num_kv_heads, ffn; instruct and chat models alike
        "falcon_7b": _size(32, 4544, 71, 1, 4 * 4544, layer_norms=1),
        "falcon_40b": _size(60, 8192, 128, 8, 4 * 8192),
        "falcon_180b": _size(80, 14848, 232, 8, 4 * 14848),
    },
)  # fmt: skip

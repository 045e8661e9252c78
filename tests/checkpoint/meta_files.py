"""Meta's files of a model that transformers made, written with explicit loops: the independent truth of the tests."""

import json
from pathlib import Path

import torch

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, THETA = 509, 32, 48, 4, 8, 2, 5e5
HEAD_DIM = HIDDEN // HEADS
# Meta's names, and the dimension that its model-parallel ranks split; None: whole in each.
META = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
    "model.norm.weight": ("norm.weight", None),
    "lm_head.weight": ("output.weight", 0),
    "input_layernorm.weight": ("attention_norm.weight", None),
    "self_attn.q_proj.weight": ("attention.wq.weight", 0),
    "self_attn.k_proj.weight": ("attention.wk.weight", 0),
    "self_attn.v_proj.weight": ("attention.wv.weight", 0),
    "self_attn.o_proj.weight": ("attention.wo.weight", 1),
    "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
}


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Half-split rotary order to Meta's, row by row."""
    out = torch.empty_like(weight)
    head_dim = weight.shape[0] // num_heads
    for head in range(num_heads):
        for pair in range(head_dim // 2):
            out[head * head_dim + 2 * pair] = weight[head * head_dim + pair]
            out[head * head_dim + 2 * pair + 1] = weight[head * head_dim + head_dim // 2 + pair]
    return out


def meta_name(name: str) -> tuple[str, int | None]:
    if not name.startswith("model.layers."):
        return META[name]
    _, _, layer, rest = name.split(".", 3)
    ours, dim = META[rest]
    return f"layers.{layer}.{ours}", dim


def write_meta(
    path: Path, tensors: dict[str, torch.Tensor], shards: int, embedding_dim: int = 1, **params: object
) -> Path:
    """The same model as Meta would ship it, in `shards` model-parallel files."""
    path.mkdir()
    files: list[dict[str, torch.Tensor]] = [{"rope.freqs": torch.arange(HEAD_DIM // 2)} for _ in range(shards)]
    for name, tensor in tensors.items():
        ours, dim = meta_name(name)
        if ours == "tok_embeddings.weight":
            dim = embedding_dim
        if name.endswith("q_proj.weight"):
            tensor = interleave(tensor, HEADS)
        if name.endswith("k_proj.weight"):
            tensor = interleave(tensor, KV_HEADS)
        for shard, file in enumerate(files):
            if dim is None:
                file[ours] = tensor.clone()
            else:
                each = -(-tensor.shape[dim] // shards)
                index = torch.arange(shard * each, min((shard + 1) * each, tensor.shape[dim]))
                file[ours] = tensor.index_select(dim, index)
    for shard, file in enumerate(files):
        torch.save(file, path / f"consolidated.{shard:02d}.pth")
    values = {
        "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "norm_eps": 1e-5,
        "rope_theta": THETA, "multiple_of": 16, "vocab_size": -1,
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps(values | params))
    return path

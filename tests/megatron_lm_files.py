"""Megatron-LM's files made by hand from Hugging Face's tensors: docs/proof says that they are its own converter's.

Plain torch on whole tensors, with nothing of llmpipe's tables.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
_CORE = {
    "embedding": "embedding.word_embeddings.weight", "norm": "decoder.final_layernorm.weight",
    "head": "output_layer.weight", "input": "self_attention.linear_qkv.layer_norm_weight",
    "qkv": "self_attention.linear_qkv", "dense": "self_attention.linear_proj.weight",
    "post": "mlp.linear_fc1.layer_norm_weight", "fc1": "mlp.linear_fc1.weight", "fc2": "mlp.linear_fc2.weight",
}  # fmt: skip
_LOCAL = _CORE | {"input": "input_layernorm.weight", "post": "pre_mlp_layernorm.weight"}
_LEGACY = {
    "embedding": "embedding.word_embeddings.weight", "norm": "encoder.final_norm.weight",
    "head": "output_layer.weight", "input": "input_norm.weight", "qkv": "self_attention.query_key_value",
    "dense": "self_attention.dense.weight", "post": "post_attention_norm.weight", "fc1": "mlp.dense_h_to_4h.weight",
    "fc2": "mlp.dense_4h_to_h.weight",
}  # fmt: skip
NAMES = {"mcore": _CORE, "local": _LOCAL, "legacy": _LEGACY}


def random_model(
    layers: int = 4, hidden: int = 32, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, ffn: int = 20,
    vocab: int = 131, qkv_bias: bool = False, qk_norm: bool = False, tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, dict[str, Any]]:  # fmt: skip
    """Tensors by Hugging Face's names, none alike, and config.json's keys for them."""
    made = torch.Generator().manual_seed(5)
    sizes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    sizes |= {} if tied else {"lm_head.weight": (vocab, hidden)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        sizes |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            sizes[f"{layer}.self_attn.{part}_proj.weight"] = (count * head_dim, hidden)
            sizes |= {f"{layer}.self_attn.{part}_proj.bias": (count * head_dim,)} if qkv_bias else {}
        sizes |= {f"{layer}.self_attn.{part}_norm.weight": (head_dim,) for part in "qk" if qk_norm}
        sizes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        sizes |= {f"{layer}.mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        sizes[f"{layer}.mlp.down_proj.weight"] = (hidden, ffn)
    config = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab, "rms_norm_eps": 3e-5,
        "max_position_embeddings": 64, "rope_theta": 23000,
    }  # fmt: skip
    return {name: torch.randn(size, generator=made).to(dtype) for name, size in sizes.items()}, config


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([rows, rows[-1:].expand(count - len(rows), -1)])


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """For each KV head its query heads, it, and its values; matrices or vectors."""
    split = [part.chunk(kv_heads) for part in (q, k, v)]
    return torch.cat([torch.cat(group) for group in zip(*split, strict=True)])


def layer(hf: Tensors, number: int, kv_heads: int, tp: int, rank: int, names: dict[str, str]) -> Tensors:
    """One layer of a rank."""
    here = {name.split(f".{number}.")[1]: value for name, value in hf.items() if f"layers.{number}." in name}
    found = {names["input"]: here["input_layernorm.weight"], names["post"]: here["post_attention_layernorm.weight"]}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in here:
            parts = [here[f"self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{names['qkv']}.{kind}"] = grouped(*parts, kv_heads).chunk(tp)[rank]
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in here:
            found[f"self_attention.{part}_layernorm.weight"] = here[f"self_attn.{part}_norm.weight"]
    gate, up = (here[f"mlp.{part}_proj.weight"].chunk(tp)[rank] for part in ("gate", "up"))
    found[names["fc1"]] = torch.cat([gate, up])
    found[names["dense"]] = here["self_attn.o_proj.weight"].chunk(tp, dim=1)[rank]
    found[names["fc2"]] = here["mlp.down_proj.weight"].chunk(tp, dim=1)[rank]
    return found


def stage(
    hf: Tensors, kv_heads: int, names: dict[str, str], tp: int, rank: int, layers: range, first: bool, last: bool
) -> Tensors:
    """The tensors of a stage of a rank, flat; the vocabulary is padded to multiples of 128 x tp."""
    vocab = hf["model.embed_tokens.weight"]
    rows = -(-len(vocab) // (128 * tp)) * 128 * tp
    found = {names["embedding"]: padded(vocab, rows).chunk(tp)[rank]} if first else {}
    prefix = "encoder" if names is _LEGACY else "decoder"
    for local, number in enumerate(layers):
        made = layer(hf, number, kv_heads, tp, rank, names)
        found |= {f"{prefix}.layers.{local}.{name}": tensor for name, tensor in made.items()}
    if last:
        found[names["norm"]] = hf["model.norm.weight"]
        if "lm_head.weight" in hf or not first:
            found[names["head"]] = padded(hf.get("lm_head.weight", vocab), rows).chunk(tp)[rank]
    return {name: tensor.clone() for name, tensor in found.items()}


def table(tensors: Tensors, kind: str) -> dict[str, Any]:
    """What stands under `model`: flat with states between, or tables within tables."""
    if kind != "legacy":
        return tensors | {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
    model: dict[str, Any] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        model.setdefault(part, {})[rest] = tensor
    if "embedding" in model:
        model["embedding"] = {"word_embeddings": {"weight": model["embedding"]["word_embeddings.weight"]}}
    return {"language_model": model}


def args_of(config: dict[str, Any], tp: int, pp: int, **changes: Any) -> Namespace:
    """The arguments that say what the model is, as its trainer saves them."""
    found: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"], "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"], "kv_channels": config["head_dim"],
        "ffn_hidden_size": config["intermediate_size"], "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"], "norm_epsilon": config["rms_norm_eps"],
        "rotary_base": int(config["rope_theta"]), "rotary_percent": 1.0, "rotary_interleaved": False,
        "position_embedding_type": "rope", "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None,
        "normalization": "RMSNorm", "apply_layernorm_1p": False, "swiglu": True, "add_bias_linear": False,
        "add_qkv_bias": False, "qk_layernorm": False, "untie_embeddings_and_output_weights": True,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
    }  # fmt: skip
    return Namespace(**found | changes)


def write(
    root: Path, hf: Tensors, config: dict[str, Any], kind: str, tp: int, stages: list[list[range]], **changes: Any
) -> Path:
    """A directory of rank files; `stages` says the layers of each rank's virtual stages; `changes` are of the args."""
    kv_heads, pp, count = config["num_key_value_heads"], len(stages), config["num_hidden_layers"]
    for tp_rank in range(tp):
        for pp_rank, runs in enumerate(stages):
            models = [
                table(stage(hf, kv_heads, NAMES[kind], tp, tp_rank, run, 0 in run, count - 1 in run), kind)
                for run in runs
            ]
            named = {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}
            folder = root / "iter_0000001" / (f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            args = args_of(config, tp, pp, **({"rank": tp_rank + 2 * tp * pp_rank} | changes))  # dp is 2
            beside = {"checkpoint_version": 3.0, "iteration": 1, "optimizer": {"state": torch.zeros(3)}}
            torch.save({"args": args, **named, **beside}, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return root


def stacked(hf: Tensors, kv_heads: int, layers: int) -> Tensors:
    """What torch_dist holds: a tensor of all layers, unsplit, the norms by the names of Transformer Engine."""
    whole = stage(hf, kv_heads, _CORE, 1, 0, range(layers), True, True)
    names = {name.split(".0.", 1)[1] for name in whole if ".layers.0." in name}
    found = {name: tensor for name, tensor in whole.items() if ".layers." not in name}
    return found | {
        f"decoder.layers.{name}": torch.stack([whole[f"decoder.layers.{i}.{name}"] for i in range(layers)])
        for name in names
    }

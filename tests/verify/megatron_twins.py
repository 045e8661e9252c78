"""Rank files of each fork of Megatron, laid out head by head from a Hugging Face model, by what docs/proof records.

Nothing of llmpipe's readers, writers or tables is used.
"""

import shutil
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from twins import interleave

LAYERS, HIDDEN, HEADS, FFN, VOCAB, PADDED = 4, 64, 8, 96, 150, 192
SIZE = HIDDEN // HEADS
THETA, EPS = 5e4, 3e-5


def llama(path: Path, kv_heads: int, config_class=LlamaConfig, model_class=LlamaForCausalLM, **more) -> Path:
    torch.manual_seed(7)
    settings = {"rope_theta": THETA, "rope_type": "default"}
    config = config_class(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, rms_norm_eps=EPS,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=512, initializer_range=0.1,
        **({"rope_parameters": settings} | more),
    )  # fmt: skip
    return saved(model_class(config), path)


def falcon(path: Path, kv_heads: int) -> Path:
    torch.manual_seed(7)
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, alibi=False,
        num_kv_heads=kv_heads, multi_query=kv_heads == 1, new_decoder_architecture=kv_heads > 1, parallel_attn=True,
        bias=False, layer_norm_epsilon=EPS, initializer_range=0.1, max_position_embeddings=512,
    )  # fmt: skip
    return saved(FalconForCausalLM(config), path)


def saved(model, path: Path) -> Path:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # ones and zeros would hide a swap of two norms
            parameter.data.uniform_(-0.5, 0.5) if name.endswith("bias") else parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


def padded(tensor: torch.Tensor, zeros: bool) -> torch.Tensor:
    more = torch.zeros_like(tensor[-1:]) if zeros else tensor[-1:]
    return torch.cat((tensor, more.expand(PADDED - VOCAB, -1)))


def grouped(q, k, v, kv_heads: int) -> torch.Tensor:
    """[queries of the group, its key, its value], group after group."""
    per_group = HEADS // kv_heads
    rows = []
    for group in range(kv_heads):
        first = group * per_group * SIZE
        rows += [q[first : first + per_group * SIZE]]
        rows += [k[group * SIZE : (group + 1) * SIZE], v[group * SIZE : (group + 1) * SIZE]]
    return torch.cat(rows)


def layer_of(fork: str, hf: dict, number: int, tp: int, kv_heads: int) -> list[dict[str, torch.Tensor]]:
    """A layer's tensors of each TP rank; keys without the layer's number."""
    get = lambda name: hf[f"model.layers.{number}.{name}.weight"]  # noqa: E731
    q, k, v = get("self_attn.q_proj"), get("self_attn.k_proj"), get("self_attn.v_proj")
    if fork in ("epf", "epf fresh", "mfz"):
        q, k = interleave(q), interleave(k)
    qkvs = list(grouped(q, k, v, kv_heads).chunk(tp))
    if fork == "ali":
        qkvs = [torch.cat((q.chunk(tp)[rank], k.chunk(tp)[rank], v.chunk(tp)[rank])) for rank in range(tp)]
    first, second = ("up", "gate") if fork.startswith("epf") else ("gate", "up")
    first, second = get(f"mlp.{first}_proj").chunk(tp), get(f"mlp.{second}_proj").chunk(tp)
    norms = get("input_layernorm"), get("post_attention_layernorm")
    names = {
        "epf fresh": ("attention.query_key_value", "attention.dense", "input_layernorm", "post_attention_layernorm"),
        "mfz": ("self_attention.query_key_value", "self_attention.dense", "input_rmsnorm", "post_attention_rmsnorm"),
        "legacy": ("self_attention.query_key_value", "self_attention.dense", "input_norm", "post_attention_norm"),
        "mcore": ("self_attention.linear_qkv", "self_attention.linear_proj", "input_layernorm", "pre_mlp_layernorm"),
        "te": ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.linear_qkv.layer_norm",
               "mlp.linear_fc1.layer_norm"),
    }.get(fork, ("self_attention.query_key_value", "self_attention.dense", "input_layernorm",
                 "post_attention_layernorm"))  # fmt: skip
    mlp = (
        ("mlp.linear_fc1", "mlp.linear_fc2") if fork in ("mcore", "te") else ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    )
    dot = "_" if fork == "te" else "."
    return [
        {
            f"{names[0]}.weight": qkvs[rank],
            f"{names[1]}.weight": get("self_attn.o_proj").chunk(tp, 1)[rank],
            f"{names[2]}{dot}weight": norms[0],
            f"{names[3]}{dot}weight": norms[1],
            f"{mlp[0]}.weight": torch.cat((first[rank], second[rank])),
            f"{mlp[1]}.weight": get("mlp.down_proj").chunk(tp, 1)[rank],
        }
        for rank in range(tp)
    ]


def model_of(fork: str, layers: dict, embedding, head, norm) -> dict:
    """One rank's "model"; what a stage does not hold is None."""
    if fork in ("mcore", "te"):
        flat = {f"decoder.{key}": value for key, value in layers.items()}
        flat |= {"decoder.layers.0.self_attention.core_attention._extra_state": None} if fork == "te" else {}
        outside = {"embedding.word_embeddings.weight": embedding, "decoder.final_layernorm.weight": norm,
                   "output_layer.weight": head}  # fmt: skip
        return flat | {key: value for key, value in outside.items() if value is not None}
    last = {"legacy": "final_norm", "mfz": "final_rmsnorm"}.get(fork, "final_layernorm")
    encoder = layers | ({f"{last}.weight": norm} if norm is not None else {})
    language = {"transformer" if fork == "epf fresh" else "encoder": encoder}
    if embedding is not None:
        nested = (
            {"word_embeddings.weight": embedding} if fork == "epf fresh" else {"word_embeddings": {"weight": embedding}}
        )
        language["embedding"] = nested
    if head is not None and fork.startswith("epf"):
        language["lm_head"] = head
    elif head is not None and fork != "ali":
        language["output_layer"] = {"weight": head}
    return {"language_model": language} | ({"lm_head": {"weight": head}} if head is not None and fork == "ali" else {})


def arguments(fork: str, kv_heads: int, **more) -> Namespace | None:
    if fork == "mfz":
        return None
    args = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 512}
    if fork.startswith("epf"):
        args |= {"num_attention_heads_kv": kv_heads, "layernorm_epsilon": EPS, "rope_theta": THETA,
                 "glu_activation": "swiglu", "tie_embed_logits": False}  # fmt: skip
    if fork == "ali":
        args |= {"orig_vocab_size": VOCAB}
    if fork in ("legacy", "mcore", "te"):
        args |= {"group_query_attention": kv_heads != HEADS, "num_query_groups": kv_heads if kv_heads != HEADS else 1,
                 "norm_epsilon": EPS, "rotary_base": THETA, "rotary_percent": 1.0, "normalization": "RMSNorm",
                 "vocab_size": VOCAB, "kv_channels": SIZE, "untie_embeddings_and_output_weights": True}  # fmt: skip
    return Namespace(**(args | more))


def write(fork: str, hf: dict, path: Path, tp: int, pp: int, kv_heads: int, less_one: bool = False, **more) -> Path:
    """A Hugging Face state_dict as a fork's rank files."""
    args = arguments(fork, kv_heads, **more)
    if less_one:
        hf = {name: tensor - 1 if "norm" in name else tensor for name, tensor in hf.items()}
    embedding, head = (padded(hf[f"{name}.weight"], fork == "mfz") for name in ("model.embed_tokens", "lm_head"))
    heads = [hf["lm_head.weight"]] * tp if fork == "ali" else head.chunk(tp)
    for stage in range(pp):
        numbers = range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)
        layers = [layer_of(fork, hf, number, tp, kv_heads) for number in numbers]
        for rank in range(tp):
            flat = {f"layers.{i}.{key}": value for i, layer in enumerate(layers) for key, value in layer[rank].items()}
            first, last = stage == 0, stage == pp - 1
            norm = hf["model.norm.weight"] if last else None
            model = model_of(
                fork, flat, embedding.chunk(tp)[rank] if first else None, heads[rank] if last else None, norm
            )
            save_rank(path / "iter_0000003", rank, stage, pp, {"model": model, "args": args})
    (path / "latest_checkpointed_iteration.txt").write_text("3")
    return path


def write_falcon(hf: dict, path: Path, tp: int, pp: int, kv_heads: int) -> Path:
    """Falcon as Megatron-LLM's rank files: tied, its last stage with a copy of the embedding."""
    args = Namespace(num_attention_heads=HEADS, num_attention_heads_kv=kv_heads, layernorm_epsilon=EPS,
                     parallel_attn=True, parallel_layernorm=kv_heads > 1, glu_activation=None)  # fmt: skip
    names = {"ln_attn": "input_layernorm", "ln_mlp": "mlp_layernorm"}
    embedding = padded(hf["transformer.word_embeddings.weight"], False).chunk(tp)
    for stage in range(pp):
        for rank in range(tp):
            encoder, first = {}, stage * LAYERS // pp
            for name, tensor in hf.items():
                words = name.split(".")
                if words[1] != "h" or not first <= int(words[2]) < first + LAYERS // pp:
                    continue
                rest = ".".join(names.get(word, word) for word in words[3:])
                if "query_key_value" in rest:
                    size = HEADS // kv_heads + 2
                    tensor = torch.cat([part if i % size == size - 1 else interleave(part)
                                        for i, part in enumerate(tensor.split(SIZE))]).chunk(tp)[rank]  # fmt: skip
                elif tensor.ndim > 1:
                    tensor = tensor.chunk(tp, 0 if "h_to_4h" in rest else 1)[rank]
                encoder[f"layers.{int(words[2]) - first}.{rest}"] = tensor
            model: dict = {"language_model": {"encoder": encoder}}
            if stage == 0:
                model["language_model"]["embedding"] = {"word_embeddings": {"weight": embedding[rank]}}
            elif stage == pp - 1:
                model["word_embeddings_for_head"] = {"weight": embedding[rank]}
            if stage == pp - 1:
                encoder |= {f"final_layernorm.{kind}": hf[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")}
            save_rank(path / "release", rank, stage, pp, {"model": model, "args": args})
    (path / "latest_checkpointed_iteration.txt").write_text("release")
    return path


def write_torch_dist(hf: dict, path: Path, kv_heads: int) -> Path:
    """As Megatron-LM writes it: `common.pt` with the arguments, the layers' tensors in one, whole over the TP ranks."""
    folder = write("te", hf, path, 1, 1, kv_heads) / "iter_0000003"
    content = torch.load(folder / "mp_rank_00/model_optim_rng.pt", weights_only=False)
    shutil.rmtree(folder / "mp_rank_00")
    flat, stacked = content.pop("model"), {}
    for key in [key for key in flat if "layers.0." in key and flat[key] is not None]:
        stacked[key.replace(".0.", ".", 1)] = torch.stack(
            [flat[key.replace(".0.", f".{i}.", 1)] for i in range(LAYERS)]
        )
    outside = {key: tensor for key, tensor in flat.items() if "layers." not in key}
    dcp.save(stacked | outside | {"optimizer.state.x": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    torch.save(content, folder / "common.pt")
    return path


def save_rank(folder: Path, rank: int, stage: int, pp: int, content: dict) -> None:
    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    (folder / name).mkdir(parents=True)
    content = {"checkpoint_version": 3.0, "iteration": 3} | content
    content["model"] = cloned(content["model"])
    torch.save(content, folder / name / "model_optim_rng.pt")


def cloned(tree):
    """torch.save writes the whole tensor that a view is of."""
    if isinstance(tree, dict):
        return {key: cloned(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, torch.Tensor) else tree

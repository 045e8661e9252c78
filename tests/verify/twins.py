"""A tiny model twice: a Hugging Face directory written by transformers, and its Meta twin made head by head here.

Nothing of llmpipe's readers, writers or tables is used, save the manifest that every checkpoint has.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 4, 64, 8, 2, 96, 160
HEAD_SIZE = HIDDEN // HEADS
COLUMNS = ("attention.wo", "feed_forward.w2", "tok_embeddings")
META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_hf(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as transformers saves it, with a manifest."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512,
        rms_norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones would hide a swap of the two norms
            parameter.data.uniform_(0.5, 1.5)
    model.model.embed_tokens.weight.data[3, :4] = 0
    model.to(dtype).save_pretrained(path)
    sign(path)
    return path


def make_meta(hf: Path, path: Path, shards: int = 2) -> Path:
    """The Meta twin of a Hugging Face directory."""
    path.mkdir()
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, tensor in load_file(hf / "model.safetensors").items():
        meta = meta_name(name)
        if ".wq." in meta or ".wk." in meta:
            tensor = interleave(tensor)
        kind = (
            meta.removesuffix(".weight").split(".", 2)[-1]
            if meta.startswith("layers.")
            else meta.removesuffix(".weight")
        )
        pieces = [tensor] * shards if "norm" in kind else tensor.chunk(shards, 1 if kind in COLUMNS else 0)
        for part, piece in zip(parts, pieces, strict=True):
            part[meta] = piece.clone()
    for number, part in enumerate(parts):
        torch.save(part, path / f"consolidated.{number:02d}.pth")
    params = {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": -1,
              "multiple_of": 32, "norm_eps": 1e-5}  # fmt: skip
    (path / "params.json").write_text(json.dumps(params))
    return path


def meta_name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
               "lm_head.weight": "output.weight"}  # fmt: skip
    if name in outside:
        return outside[name]
    layer, kind = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"layers.{layer}.{META[kind]}.weight"


def interleave(tensor: torch.Tensor) -> torch.Tensor:
    """Rows from half-split to neighbours, head by head: row i of the first half, row i of the second, and so on."""
    rows = []
    for head in range(tensor.shape[0] // HEAD_SIZE):
        for i in range(HEAD_SIZE // 2):
            rows += [tensor[head * HEAD_SIZE + i], tensor[head * HEAD_SIZE + HEAD_SIZE // 2 + i]]
    return torch.stack(rows)


def sign(path: Path, kind: str = "checkpoint", source: dict | None = None) -> None:
    """A manifest over the directory as it is now."""
    (path / manifest.NAME).unlink(missing_ok=True)
    manifest.write(path, kind, source or {})


def edit(path: Path, change) -> None:
    """Let `change` alter a checkpoint's tensors in place, as a wrong converter would have, and sign it."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    sign(path)


def edit_config(path: Path, **values) -> None:
    """Set keys of config.json, and sign it."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    sign(path)

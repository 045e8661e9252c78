"""Tiny Llama checkpoints in Hugging Face's format whose every bit follows from names and shapes alone.

They are the common input of the originals' converters and of ours (docs/proof). Values come from numpy's PCG64, seeded
with the tensor's name: no library's random initialization is part of them.

    python benchmarks/proof/tiny.py gqa_8_2 DIRECTORY [--dtype bfloat16]
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

# num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab: awkward on purpose; 12 and 4 are no squares.
SHAPES = {
    "mha_4": (4, 32, 4, 4, 8, 88, 131),
    "mha_6": (4, 72, 6, 6, 12, 180, 131),
    "gqa_8_2": (4, 64, 8, 2, 8, 168, 131),
    "gqa_6_3": (4, 48, 6, 3, 8, 120, 131),
    "gqa_12_4": (4, 96, 12, 4, 8, 176, 131),
}


def values(name: str, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Multiples of 2^-20 within 1/32, about one in norms; the same bits on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    whole = np.random.Generator(np.random.PCG64(seed)).integers(-(2**15), 2**15, size=size)
    found = torch.from_numpy(whole.astype(np.float32) / 2**20)
    return (found + 1 if "norm" in name and name.endswith("weight") else found).to(dtype)


def state_dict(shape: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor, by Hugging Face's names."""
    num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab = SHAPES[shape]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (num_heads * head_dim, hidden),
        "self_attn.k_proj": (num_kv_heads * head_dim, hidden),
        "self_attn.v_proj": (num_kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, num_heads * head_dim),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    sizes = {"model.embed_tokens.weight": (vocab, hidden)}
    sizes |= {f"model.layers.{i}.{name}.weight": size for i in range(num_layers) for name, size in layer.items()}
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: values(name, size, dtype) for name, size in sizes.items()}


def config(shape: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """config.json: rope theta and eps differ from every default, so that a lost one shows."""
    num_layers, hidden, num_heads, num_kv_heads, head_dim, ffn, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": 3e-5,
        "rope_theta": 23000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write(shape: str, directory: Path, dtype: torch.dtype = torch.float32, **said: object) -> None:
    """A Hugging Face directory of a shape's name; `said`: keys of config.json beside, or instead of, the usual."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state_dict(shape, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(shape, dtype) | said, indent=2) + "\n")


def digest(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's bytes, row-major: what docs/proof lists."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.directory, getattr(torch, arguments.dtype))

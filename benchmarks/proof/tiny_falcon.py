"""Tiny Falcon checkpoints in Hugging Face's format whose every bit follows from names, as in tiny.py.

`falcon_7_1` is built as the 7B is (one KV head, one LayerNorm), `falcon_8_2` as the 40B (new decoder, two LayerNorms).

    python benchmarks/proof/tiny_falcon.py falcon_7_1 DIRECTORY [--dtype bfloat16]
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import values

# num_layers, hidden, num_heads, num_kv_heads, head_dim, vocab, new decoder.
SHAPES = {
    "falcon_7_1": (4, 56, 7, 1, 8, 131, False),
    "falcon_8_2": (4, 64, 8, 2, 8, 131, True),
}


def state_dict(shape: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every tensor, by Hugging Face's names; the head is the embedding."""
    num_layers, hidden, num_heads, num_kv_heads, head_dim, vocab, new_decoder = SHAPES[shape]
    layer = {
        "self_attention.query_key_value.weight": ((num_heads + 2 * num_kv_heads) * head_dim, hidden),
        "self_attention.dense.weight": (hidden, num_heads * head_dim),
        "mlp.dense_h_to_4h.weight": (4 * hidden, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden),
    }
    norms = ("ln_attn", "ln_mlp") if new_decoder else ("input_layernorm",)
    sizes = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for i in range(num_layers):
        sizes |= {f"transformer.h.{i}.{name}.{kind}": (hidden,) for name in norms for kind in ("weight", "bias")}
        sizes |= {f"transformer.h.{i}.{name}": size for name, size in layer.items()}
    sizes |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    found = {name: values(name, size, dtype) for name, size in sizes.items()}
    for name in found:  # tiny.values makes norms about one by the word "norm" alone
        if name.endswith(("ln_attn.weight", "ln_mlp.weight", "ln_f.weight")):
            found[name] = (values(name, sizes[name]) + 1).to(dtype)
    return found


def config(shape: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """config.json: rope theta and eps differ from every default, so that a lost one shows."""
    num_layers, hidden, num_heads, num_kv_heads, _, vocab, new_decoder = SHAPES[shape]
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "multi_query": not new_decoder,
        "new_decoder_architecture": new_decoder,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "layer_norm_epsilon": 3e-5,
        "rope_theta": 23000.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write(shape: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """A Hugging Face directory of a shape's name."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state_dict(shape, dtype), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(shape, dtype), indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    write(arguments.shape, arguments.directory, getattr(torch, arguments.dtype))

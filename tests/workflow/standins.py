"""Weights that stand in for Llama 2's: Meta's real headers, names, types and sizes, and no bytes on the disk."""

import json
from pathlib import Path

import sentencepiece
import torch

# params.json as Meta publishes it, and in how many files: 32000 tokens, as the tokenizer says.
PARAMS = {
    "llama2_7b": (1, {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}),
    "llama2_13b": (2, {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5}),
    "llama2_70b": (
        8,
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
         "norm_eps": 1e-5},
    ),
}  # fmt: skip
FFN = {"llama2_7b": 11008, "llama2_13b": 13824, "llama2_70b": 28672}
VOCAB = 32000


def meta_weights(folder: Path, name: str) -> None:
    """consolidated.*.pth, params.json and a small tokenizer.model."""
    shards, params = PARAMS[name]
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    for shard in range(shards):
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shard_shapes(name).items()}
        with torch.serialization.skip_data():
            torch.save(tensors, folder / f"consolidated.{shard:02}.pth")
    text = folder / "text"
    text.write_text("\n".join(f"{number} words of a sentence" for number in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    text.unlink()


def shard_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of one of Meta's files: rows or columns split over the files, norms whole."""
    shards, params = PARAMS[name]
    dim, ffn = params["dim"], FFN[name] // shards
    q = dim // shards
    kv = dim * params.get("n_kv_heads", params["n_heads"]) // params["n_heads"] // shards
    layer = {
        "attention.wq": (q, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim), "attention.wo": (dim, q),
        "feed_forward.w1": (ffn, dim), "feed_forward.w2": (dim, ffn), "feed_forward.w3": (ffn, dim),
        "attention_norm": (dim,), "ffn_norm": (dim,),
    }  # fmt: skip
    shapes = {
        "tok_embeddings.weight": (VOCAB, dim // shards),
        "norm.weight": (dim,),
        "output.weight": (VOCAB // shards, dim),
    }
    for number in range(params["n_layers"]):
        shapes |= {f"layers.{number}.{key}.weight": shape for key, shape in layer.items()}
    return shapes

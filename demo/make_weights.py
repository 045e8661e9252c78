"""make_weights.py CORPUS OUTPUT: weights as Meta publishes them: tokenizer.model, params.json, consolidated.*.pth.

The tokenizer is trained on part of the corpus. The weights are random, in Meta's names and shapes, split over two
files as for two model-parallel ranks: a valid checkpoint of a model that knows nothing yet.
"""

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import sentencepiece
import torch

NUM_SHARDS = 2
TOKENIZER_DOCUMENTS = 400
PARAMS = {
    "dim": 128,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": 1500,
}
FFN = 352  # Meta's rule: 2/3 of 4 · dim, rounded up to multiple_of


def train_tokenizer(corpus: Path, prefix: Path) -> None:
    """A SentencePiece BPE model with byte fallback and the settings of Llama's."""
    with corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in islice(file, TOKENIZER_DOCUMENTS)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines()),
        model_prefix=str(prefix),
        vocab_size=PARAMS["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=1,
    )


def tensors() -> dict[str, tuple[torch.Tensor, int | None]]:
    """Meta's tensors, each with the dimension that model-parallel ranks split; norms are on all of them."""
    generator = torch.Generator().manual_seed(0)
    dim, vocab = PARAMS["dim"], PARAMS["vocab_size"]
    kv_dim = dim // PARAMS["n_heads"] * PARAMS["n_kv_heads"]

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    ones = torch.ones(dim, dtype=torch.bfloat16)
    found: dict[str, tuple[torch.Tensor, int | None]] = {"tok_embeddings.weight": (random(vocab, dim), 1)}
    for i in range(PARAMS["n_layers"]):
        found |= {
            f"layers.{i}.attention.wq.weight": (random(dim, dim), 0),
            f"layers.{i}.attention.wk.weight": (random(kv_dim, dim), 0),
            f"layers.{i}.attention.wv.weight": (random(kv_dim, dim), 0),
            f"layers.{i}.attention.wo.weight": (random(dim, dim), 1),
            f"layers.{i}.feed_forward.w1.weight": (random(FFN, dim), 0),
            f"layers.{i}.feed_forward.w2.weight": (random(dim, FFN), 1),
            f"layers.{i}.feed_forward.w3.weight": (random(FFN, dim), 0),
            f"layers.{i}.attention_norm.weight": (ones.clone(), None),
            f"layers.{i}.ffn_norm.weight": (ones.clone(), None),
        }
    return found | {"norm.weight": (ones.clone(), None), "output.weight": (random(vocab, dim), 0)}


def main() -> None:
    corpus, output = Path(sys.argv[1]), Path(sys.argv[2])
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    train_tokenizer(corpus, part / "tokenizer")
    (part / "tokenizer.vocab").unlink()
    (part / "params.json").write_text(json.dumps(PARAMS))
    full = tensors()
    for shard in range(NUM_SHARDS):
        mine = {
            name: tensor if dim is None else tensor.chunk(NUM_SHARDS, dim)[shard].clone()
            for name, (tensor, dim) in full.items()
        }
        torch.save(mine, part / f"consolidated.{shard:02}.pth")
    shutil.rmtree(output, ignore_errors=True)
    part.replace(output)


main()

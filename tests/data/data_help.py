"""What the data tests make: tokenizers, datasets, manifests."""

import io
import this
import zlib
from pathlib import Path

import numpy as np
import sentencepiece

from llmpipe.data.dataset.indexed import Writer

TEXT = [
    "Beautiful is better than ugly.",
    "def encode(text: str) -> list[int]:",
    "    return [ord(letter) for letter in text]",
    "In the face of ambiguity, refuse the temptation to guess.",
    *(this.__doc__ or "").splitlines(),
    *(zlib.__doc__ or "").splitlines(),
    *(io.__doc__ or "").splitlines(),
]


def train(path: Path, vocab_size: int, normalizer: str = "identity", **options: object) -> Path:
    """A BPE model with byte fallback that changes no text, as Llama's."""
    model, settings = io.BytesIO(), {"byte_fallback": True, "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in TEXT if line.strip()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name=normalizer,
        minloglevel=2,
        **settings,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


def dataset(prefix: Path, lengths: list[int], first_token: int = 0) -> list[np.ndarray]:
    """A dataset whose tokens are all different, so that every mix-up shows; also its documents."""
    ends = np.cumsum(lengths) + first_token
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    with Writer(prefix, np.dtype(np.int32)) as writer:
        for tokens in documents:
            writer.add(tokens, np.array([len(tokens)]))
    return documents


def facts(sha256: str = "aa", **counts: int) -> dict:
    tokenizer = {"path": f"{sha256}/tokenizer.model", "sha256": sha256, "vocab_size": 300, "bos_id": 1, "eos_id": 2}
    counts = {"documents": 1, "empty_documents": 0, "tokens": 2} | counts
    rules = {"bos": True, "append_eod": True, "text_key": "text"}
    return {"tokenizer": tokenizer, **rules, **counts, "sources": [{"path": sha256}]}

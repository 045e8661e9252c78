"""Tiny datasets and samplings whose every token follows from names: what the originals and llmpipe are both given.

A dataset is documents of sequences of tokens. A sampling is datasets with weights, a split or files of their own for
each part, a sequence length, how many samples of each part, and a seed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

PARTS = ("train", "validation", "test")
FEW = [f"few{number}" for number in range(300)]

# name: seed of the generator, number of documents, longest document, vocabulary, most sequences in a document
DATASETS = {
    "even": (1, 1000, 0, 32_000, 1),
    "uneven": (2, 400, 300, 32_000, 1),
    "long": (3, 5, 9000, 65_499, 1),
    "wide": (4, 60, 80, 65_500, 1),
    "llama3": (5, 60, 80, 128_256, 1),
    "one": (6, 1, 40, 100, 1),
    "empty_documents": (7, 90, 3, 500, 1),
    "sentences": (8, 30, 50, 32_000, 6),
    **{name: (100 + number, 3, 30, 32_000, 1) for number, name in enumerate(FEW)},
}


def documents(name: str) -> list[list[NDArray[np.int64]]]:
    """The documents of a dataset, each a list of sequences."""
    seed, count, longest, vocab, most = DATASETS[name]
    random = np.random.RandomState(seed)
    found = []
    for _ in range(count):
        sequences = random.randint(1, most + 1)
        lengths = [64 if longest == 0 else random.randint(0 if count > 1 else 1, longest) for _ in range(sequences)]
        found.append([random.randint(0, vocab, length) for length in lengths])
    return found


def sampling(
    data: dict[str, float] | dict[str, dict[str, float]],
    seq_len: int,
    num_samples: tuple[int, int, int],
    split: str | None = "100,0,0",
    seed: int = 1234,
) -> dict[str, Any]:
    """A case; without a split `data` is by part."""
    return {"data": data, "split": split, "seq_len": seq_len, "num_samples": list(num_samples), "seed": seed}


# "even" holds 64,000 tokens, 969 of its 1,000 documents 62,016.
SAMPLINGS = {
    "one_epoch": sampling({"even": 1}, 64, (500, 20, 1), "969,30,1"),
    "one_epoch_of_another_seed": sampling({"even": 1}, 64, (500, 20, 1), "969,30,1", 4294967295),
    "seed_0": sampling({"uneven": 1}, 33, (700, 0, 0), seed=0),
    "last_epoch_apart": sampling({"even": 1}, 64, (3197, 40, 20), "969,30,1"),  # 3.3 epochs
    "last_epoch_together": sampling({"even": 1}, 64, (2858, 28, 1), "969,30,1"),  # 2.95 epochs
    "just_below_80_percent": sampling({"even": 1}, 64, (999 + 798, 0, 0)),
    "just_80_percent": sampling({"even": 1}, 64, (999 + 799, 0, 0)),
    "uneven_apart": sampling({"uneven": 1}, 100, (1500, 500, 300), "5,3,2", 7),
    "split_with_thirds": sampling({"long": 1}, 512, (40, 20, 30), "1,1,1", 3),
    "split_of_two": sampling({"wide": 1}, 17, (300, 200, 0), "2,1", 11),
    "longer_than_the_document": sampling({"one": 1}, 128, (9, 0, 0)),
    "short_samples": sampling({"one": 1}, 2, (100, 0, 0), seed=99),
    "empty_documents": sampling({"empty_documents": 1}, 5, (60, 10, 5), "6,3,1", 2),
    "int32": sampling({"llama3": 1}, 24, (250, 0, 0), seed=42),
    "blend_of_two": sampling({"even": 3, "uneven": 1}, 64, (900, 0, 0)),
    "blend_in_several_epochs": sampling({"uneven": 0.7, "wide": 0.2, "long": 0.1}, 50, (4000, 50, 0), "8,2,0", 5),
    "blend_whose_weights_round": sampling({"uneven": 0.1, "wide": 0.2, "long": 0.3}, 40, (2000, 0, 0), seed=8),
    "blend_with_a_rare_one": sampling({"even": 1, "one": 0.0001}, 16, (3000, 0, 0)),
    "blend_of_300": sampling({name: 1 + i % 7 for i, name in enumerate(FEW)}, 8, (2500, 0, 0), seed=17),
    "files_for_each_part": sampling({
        "train": {"even": 1, "uneven": 2}, "validation": {"long": 1, "wide": 1}, "test": {"one": 1, "llama3": 1},
    }, 32, (1500, 400, 200), None),
}  # fmt: skip

TEXTS = [
    "Beautiful is better than ugly.",
    "two\nlines, and  three spaces   ",
    "ünïcödé, 漢字 and 👩\u200d🚀",
    "</s> and <s> are text",
    "a" * 300,
    "end",
]


def text_file(path: Path) -> Path:
    """The texts as JSONL."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def tokenizer_model(path: Path) -> Path:
    """A SentencePiece BPE model with byte fallback, as Llama's, that needs no training."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    words = ["th", "an", "at", "tt", "\u2581th", "\u2581than", "au", "ti", "aa", "aaaa", "er", "tter", "\u2581\u2581"]
    letters = "\u2581abcdefghijklmnopqrstuvwxyzBSTI.,漢</>"
    pieces += [(word, kinds.NORMAL) for word in [*words, *letters]]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number) if kind == kinds.NORMAL else 0.0, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path

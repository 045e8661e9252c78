"""SentencePiece tokenizers trained on the benchmark corpus, for benchmarks/tokenizing.py --part same --tokenizer DIR...

`codellama_like`: Llama's options and CodeLlama's infilling marks as pieces of their own. `extended`: a model with the
pieces of another one, of the corpus's Chinese, Japanese and Korean text, put behind its own with the score 0, as
Chinese-LLaMA's were.

    python benchmarks/trained_tokenizers.py WORK [--megabytes 20]
"""

import argparse
import io
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import corpus
import sentencepiece

LLAMA = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True, "minloglevel": 1,
}  # fmt: skip
MARKS = ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"]
EAST_ASIAN = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}")


def lines(path: Path, megabytes: float) -> Iterator[str]:
    """Every third document's lines, until they are so many megabytes."""
    left = int(megabytes * 1e6)
    with path.open() as file:
        for number, row in enumerate(file):
            if number % 3 == 0:
                text = json.loads(row)["text"]
                left -= len(text.encode())
                yield from (line for line in text.splitlines() if line.strip() and len(line) < 4000)
            if left < 0:
                return


def train(sentences: Iterator[str], vocab_size: int, **options: object) -> bytes:
    """The bytes of a tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=vocab_size, **LLAMA, **options
    )
    return model.getvalue()


def appended(model: bytes, pieces: list[str]) -> bytes:
    """A model with more pieces of score 0: a repeated field of a protobuf message goes on where the file ends."""
    for piece in pieces:
        text = piece.encode()
        entry = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0)
        model += bytes([0x0A, len(entry)]) + entry
    return model


def pieces_of(model: bytes) -> list[str]:
    """The ordinary pieces of a model, in their order."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())
    return [
        processor.id_to_piece(i)
        for i in ids
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--megabytes", type=float, default=20)
    options = parser.parse_args()
    path = options.work / "corpus.jsonl"
    if not path.exists():
        corpus.gather(path, int(165e6))
    base = train(lines(path, options.megabytes), 16_000)
    east_asian = (line for line in lines(path, 1e6) if EAST_ASIAN.search(line))
    known = set(pieces_of(base))
    more = [piece for piece in pieces_of(train(east_asian, 6_000)) if piece not in known and len(piece.encode()) < 120]
    models = {
        "codellama_like": train(lines(path, options.megabytes), 32_000, user_defined_symbols=MARKS),
        "extended": appended(base, more),
    }
    for name, model in models.items():
        (options.work / name).mkdir(exist_ok=True)
        (options.work / name / "tokenizer.model").write_bytes(model)
        vocab = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
        print(f"{options.work / name}: {vocab:,} pieces")


if __name__ == "__main__":
    main()

"""A tokenizer.model of tiktoken's kind, and tiktoken's algorithm written plainly: the lowest rank first."""

import base64
import inspect
import typing
from pathlib import Path

import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

# As in github.com/meta-llama/llama3 llama/tokenizer.py.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tiktoken(path: Path, size: int = 500) -> dict[bytes, int]:
    """Ranks learnt from a module's source: the 256 bytes, then merges in the order in which they were made."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    learnt.train_from_iterator([inspect.getsource(typing), "中文 中文 日本 日本"], trainer)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    back = {chr(byte): byte for byte in printable}
    back |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in printable)}
    longer = [t for t, _ in sorted(learnt.get_vocab().items(), key=lambda item: item[1]) if len(t) > 1]
    ranks = [bytes([byte]) for byte in range(256)] + [bytes(back[character] for character in token) for token in longer]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))
    return {token: rank for rank, token in enumerate(ranks)}


def encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """What tiktoken gives, special tokens left as text."""
    found: list[int] = []
    for word in regex.findall(SPLIT, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            rank, at = min((ranks.get(parts[i] + parts[i + 1], 1 << 60), i) for i in range(len(parts) - 1))
            if rank == 1 << 60:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        found += [ranks[part] for part in parts]
    return found

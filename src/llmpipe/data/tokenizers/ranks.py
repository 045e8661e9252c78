"""Llama 3's tokenizer.model: tiktoken's lines of `base64-token rank`.

The split pattern and the special tokens are those of Meta's releases (github.com/meta-llama/llama3 llama/tokenizer.py,
github.com/meta-llama/llama-models): 256 special tokens follow the ranks; Llama 3.1 gave names to some.
"""

import binascii
import re
from pathlib import Path

from llmpipe.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is one of tiktoken's, by its first line."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(1 << 12)) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Every token and its rank, which are 0, 1, 2 ...; UserError otherwise."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            token, _, rank = line.partition(b" ")
            ranks[binascii.a2b_base64(token, strict_mode=True)] = int(rank)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{path} is no file of tiktoken ({error}): copy or download it again") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{path} lacks tokens: its ranks have gaps, or not every byte: copy or download it again")
    return ranks


def special_tokens(named: bool) -> list[str]:
    """The 256 names in order; `named`: as Llama 3.1 and later have them."""
    first = [BOS, EOS, *_reserved(0, 2)]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    if named:
        first += ["<|finetune_right_pad_id|>", *_reserved(2, 3), *header, "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
        return first + _reserved(3, SPECIAL - 8)
    return [*first, *_reserved(2, 4), *header, *_reserved(4, 5), "<|eot_id|>", *_reserved(5, SPECIAL - 5)]


def _reserved(start: int, stop: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(start, stop)]

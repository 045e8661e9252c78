"""Llama 3's tokenizer.model: tiktoken's lines of `base64-token rank`, and the tokenizer.json that is the same.

The split pattern and the special tokens are those of Meta's releases (github.com/meta-llama/llama3 llama/tokenizer.py,
github.com/meta-llama/llama-models): 256 special tokens follow the ranks; Llama 3.1 gave names to some.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from llmpipe.errors import UserError

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL = 256
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
            ranks[base64.b64decode(token, validate=True)] = int(rank)
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


def build(path: Path, named: bool) -> Tokenizer:
    """The same tokens as a tokenizer of the `tokenizers` library: byte-level BPE, BOS first."""
    ranks = read_ranks(path)
    vocab = {_visible(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab, _merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special_tokens(named)])
    bos = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, len(ranks))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return tokenizer


def config(max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, by its rank: tiktoken merges the pair with the lowest one."""
    found = []
    for token, rank in ranks.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found += [(rank, ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
    return [(_visible(a), _visible(b)) for _, _, _, a, b in sorted(found)]


def _visible(token: bytes) -> str:
    """A token's bytes as the printable characters that byte-level BPE writes for them (GPT-2's encoder.py)."""
    return "".join(_CHARACTERS[byte] for byte in token)


def _characters() -> list[str]:
    """Printable bytes stand for themselves, the others for the characters from 256 on, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_CHARACTERS = _characters()


def _reserved(start: int, stop: int) -> list[str]:
    return [f"<|reserved_special_token_{number}|>" for number in range(start, stop)]

"""Ranked bytes as a tokenizer of the `tokenizers` library: Llama 3's tokenizer.model and Mistral's tekken.json.

The same tokens, the same special ones, BOS first. What it encodes is held against tiktoken when it is made.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from llmpipe.data.tokenizers.ranks import BOS, EOS, PATTERN, read_ranks, special_tokens
from llmpipe.data.tokenizers.tiktoken import TikToken
from llmpipe.errors import UserError


def build(path: Path, named: bool) -> Tokenizer:
    """Of Llama 3's tokenizer.model; `named`: its special tokens have the names of Llama 3.1 and later."""
    ranks = read_ranks(path)
    return _byte_level(ranks, {}, PATTERN, special_tokens(named), (BOS, len(ranks)))


def of_tekken(truth: TikToken) -> Tokenizer:
    """Of a tekken.json, whose special tokens are the first of its vocabulary; UserError if text has one's name."""
    names = sorted(truth.special, key=truth.special.__getitem__)
    if both := [name for name in names if name.encode() in truth.pieces]:
        raise UserError(
            f"{truth.path} has {both[0]} as a special token and as one of text, which no tokenizer.json can say: put"
            " the makers' tokenizer.json beside it"
        )
    ranks = {token: truth.first_id + rank for token, rank in truth.pieces.items()}
    return _byte_level(ranks, truth.special, truth.pattern, names, ("<s>", truth.bos_id))


def _byte_level(
    ids: dict[bytes, int], first: dict[str, int], pattern: str, special: list[str], bos: tuple[str, int]
) -> Tokenizer:
    """Byte-level BPE; `first`: special tokens with ids of their own, others follow the tokens."""
    vocab = {_visible(token): number for token, number in ids.items()}
    tokenizer = Tokenizer(BPE(first | vocab, _merges(ids), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    name = bos[0]
    template = processors.TemplateProcessing(single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[bos])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def config(max_positions: int, bos: str = BOS, eos: str = EOS) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
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

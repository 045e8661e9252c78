"""Llama 3's tokenizer.model as a tokenizer of the `tokenizers` library: the same tokens, the same special ones."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from llmpipe.data.tokenizers.ranks import BOS, EOS, PATTERN, read_ranks, special_tokens


def build(path: Path, named: bool) -> Tokenizer:
    """The same tokens as a tokenizer of the `tokenizers` library: byte-level BPE, BOS first."""
    ranks = read_ranks(path)
    vocab = {_visible(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab, _merges(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
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

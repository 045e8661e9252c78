"""SentencePiece's tokenizer.model as a tokenizer of the `tokenizers` library: the same pieces, the same normalizer.

SentencePiece's own answer stays the truth; `tokenizer_files.compare` holds the two against each other. A model is a
protobuf message (github.com/google/sentencepiece src/sentencepiece_model.proto); what its Python class does not tell,
the normalizer and the kind, is read from the bytes.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from llmpipe.errors import UserError

log = logging.getLogger(__name__)

SPACE = "\u2581"
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_NORMAL, _USER_DEFINED = 1, 4
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model says of itself beyond its pieces."""

    kind: int = _UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""
    """The normalizer's compiled table, as of nmt_nfkc; empty: identity."""
    dummy_prefix: bool = True
    merge_spaces: bool = True
    """Runs of spaces become one, those at the ends go."""
    own: tuple[str, ...] = ()
    """User-defined pieces: found in a text before anything is merged."""
    tied: bool = False
    """Whether merged pieces share a score: SentencePiece then goes from left to right, which merges cannot say."""


def read_spec(model: Path) -> Spec:
    """The trainer's and the normalizer's settings of a model that SentencePiece has opened."""
    top = list(_fields(model.read_bytes()))
    trainer = dict(field for number, value in top if number == _TRAINER for field in _fields(value))
    normal = dict(field for number, value in top if number == _NORMALIZER for field in _fields(value))
    fallback, prefix, spaces = bool(trainer.get(35, 0)), bool(normal.get(3, 1)), bool(normal.get(4, 1))
    pieces = [dict(_fields(value)) for number, value in top if number == _PIECE]
    own = tuple(piece[1].decode() for piece in pieces if piece.get(3) == _USER_DEFINED)
    scores = [piece.get(2) for piece in pieces if piece.get(3, _NORMAL) == _NORMAL and len(piece[1].decode()) > 1]
    tied = trainer.get(3) == _BPE and len(set(scores)) < len(scores)
    return Spec(trainer.get(3, _UNIGRAM), fallback, normal.get(2, b""), prefix, spaces, own, tied)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message's fields: whole numbers, and bytes for everything else."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value, at, shift = value | (message[at] & 127) << shift, at + 1, shift + 7
            if message[at - 1] < 128:
                return value

    while at < len(message):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or number()
        yield tag >> 3, message[at : at + size]
        at += size


def load(model: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model; UserError if the file is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{model} is neither a SentencePiece model nor tiktoken's lines of token and rank: copy it again"
        ) from error


def build(truth: sentencepiece.SentencePieceProcessor, model: Path) -> Tokenizer:
    """The same pieces as a tokenizer of the `tokenizers` library, with the model's own normalizer."""
    spec, pieces = read_spec(model), [truth.id_to_piece(number) for number in range(truth.vocab_size())]
    tokenizer = Tokenizer(_model(truth, spec, pieces))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(spec))
    if spec.own:
        longest_first = "|".join(re.escape(piece) for piece in sorted(spec.own, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    strip = [decoders.Strip(" ", 1, 0)] if spec.dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [pieces[n] for n in range(len(pieces)) if truth.is_control(n) or truth.is_unknown(n)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    if truth.bos_id() >= 0:
        bos = pieces[truth.bos_id()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, truth.bos_id())]
        )
    return tokenizer


def _model(truth: sentencepiece.SentencePieceProcessor, spec: Spec, pieces: list[str]) -> BPE | Unigram:
    if spec.kind == _UNIGRAM:
        log.warning(
            "the tokenizer.model is a unigram model: where two splits of a text are equally likely in fp32,"
            " transformers may take the other than SentencePiece, which llmpipe asks"
        )
        scores = [(piece, truth.get_score(number)) for number, piece in enumerate(pieces)]
        return Unigram(scores, truth.unk_id(), spec.byte_fallback)
    if spec.kind != _BPE:
        raise UserError(
            "the tokenizer.model is one of words or characters: llmpipe reads SentencePiece BPE and unigram"
        )
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unknown, whole = pieces[truth.unk_id()], bool(spec.own)  # ignore_merges: a piece of its own is one token
    found = merges(truth, {*spec.own})
    return BPE(vocab, found, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback, ignore_merges=whole)


def _normalizers(spec: Spec) -> list[Any]:
    found: list[Any] = [normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []
    if spec.merge_spaces:
        found += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    found += [normalizers.Prepend(SPACE)] if spec.dummy_prefix else []
    return [*found, normalizers.Replace(" ", SPACE)]


def merges(truth: sentencepiece.SentencePieceProcessor, own: set[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: the order in which SentencePiece merges."""
    normal = {
        piece: number
        for number in range(truth.vocab_size())
        if not (truth.is_control(number) or truth.is_unknown(number) or truth.is_byte(number))
        and (piece := truth.id_to_piece(number)) not in own
    }
    found = []
    for piece, number in normal.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in normal and right in normal]
        pairs.sort(key=lambda pair: (normal[pair[0]], normal[pair[1]]))
        found += [(-truth.get_score(number), pair) for pair in pairs]
    found.sort(key=lambda entry: entry[0])  # stable: pairs of one piece stay in order
    return [pair for _, pair in found]


def config(truth: sentencepiece.SentencePieceProcessor, max_positions: int) -> dict[str, Any]:
    """tokenizer_config.json; BOS is added and EOS is not, as in Llama's published directories."""
    names = {"bos_token": truth.bos_id(), "eos_token": truth.eos_id(), "unk_token": truth.unk_id()}
    return {
        "add_bos_token": truth.bos_id() >= 0,
        "add_eos_token": False,
        **{name: truth.id_to_piece(number) for name, number in names.items() if number >= 0},
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        # LlamaTokenizer would build a tokenizer of its own from the pieces, with other ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }

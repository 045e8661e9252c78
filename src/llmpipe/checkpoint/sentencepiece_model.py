"""SentencePiece's tokenizer.model as a tokenizer of the `tokenizers` library: the same pieces, the same normalizer.

SentencePiece's own answer stays the truth; `tokenizer_files.compare` holds the two against each other.
"""

import logging
import re
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram

from llmpipe.data.tokenizers.piece_spec import BPE as BPE_KIND
from llmpipe.data.tokenizers.piece_spec import UNIGRAM, Spec, read_spec
from llmpipe.errors import UserError

log = logging.getLogger(__name__)

SPACE = "\u2581"


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
    if spec.kind == UNIGRAM:
        log.warning(
            "the tokenizer.model is a unigram model: where two splits of a text are equally likely in fp32,"
            " transformers may take the other than SentencePiece, which llmpipe asks"
        )
        scores = [(piece, truth.get_score(number)) for number, piece in enumerate(pieces)]
        return Unigram(scores, truth.unk_id(), spec.byte_fallback)
    if spec.kind != BPE_KIND:
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

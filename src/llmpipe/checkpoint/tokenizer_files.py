"""The tokenizer's files of a checkpoint: tokenizer.model is carried, tokenizer.json is made from it and proven.

SentencePiece's own answer is the truth where there is a tokenizer.model (design decision 7). transformers on a bare
tokenizer.model gives other ids, so a finished checkpoint carries a tokenizer.json of the same pieces, and a
tokenizer_config.json whose class makes transformers load exactly that file. Both ids are compared on PROBES.
"""

import logging
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from llmpipe.checkpoint.carried import copy_hashed
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.files import sha256, write_json

log = logging.getLogger(__name__)

SPACE = "\u2581"
PROBES = (
    "Hello world",
    " leading and trailing ",
    "  two  three   four    spaces",
    "\n\n\ttabs\tand\r\nlines\n    indented\n        twice\n",
    "0123456789 3.14159 1,000,000 0x7fff 2026-11-21",
    "def f(x: list[int]) -> dict:\n    return {k: v**2 for k, v in enumerate(x) if v % 2 == 0}  # why?\n",
    "It's the naïve café's façade — “quoted”, don't…",
    "Ελληνικά, русский, العربية, עברית, हिन्दी, 中文\uff0c日本語、한국어",
    "e\u0301 \u00e9 \ufb01 \u00bd \u2460 \uff21 \u00a0no-break \u200bzero\u200dwidth\ufeff",
    "😀 👩‍👩‍👧 🇨🇭 \U0001d518\U0001d52b\U0001d526 \U0010ffff",
    f"a {SPACE} literal{SPACE}{SPACE}U+2581",
    "\x00\x01\x1f\x7f control",
    "AaBbCcDdEe" * 12,
    "=" * 70 + "\n" + "-" * 33 + "\n" + "." * 17,
    "<html><body class='x'>&nbsp;</body></html> [INST] {{ template }} [/INST]",
)


def find(path: Path) -> Path | None:
    """The tokenizer.model of a directory; Meta's downloads have it beside the model's folder."""
    places = [path]
    if (path / "params.json").is_file():
        places.append(path.absolute().parent)
    return next((place / "tokenizer.model" for place in places if (place / "tokenizer.model").is_file()), None)


def load(model: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model; UserError if the file is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{model} is not a SentencePiece model: this version of llmpipe reads no other tokenizer.model"
        ) from error


def control_ids(path: Path) -> tuple[int | None, int | None]:
    """The ids of BOS and EOS that a directory's tokenizer.model says; None where it has none."""
    model = find(path)
    if model is None:
        return None, None
    tokenizer = load(model)
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return (bos if bos >= 0 else None), (eos if eos >= 0 else None)


def opened(path: Path) -> Tokenizer | None:
    """The tokenizer that a checkpoint made of this source carries as tokenizer.json; None without one."""
    given, model = path / "tokenizer.json", find(path)
    if given.is_file():
        return _from_file(given)
    return build(load(model)) if model else None


def complete(source: TensorSource, directory: Path) -> dict[str, str]:
    """Add what a checkpoint's tokenizer lacks to the files already carried; returns the SHA-256 of what was added."""
    model, given = find(source.path), source.path / "tokenizer.json"
    tokenizer = _from_file(given) if given.is_file() else None
    if tokenizer:
        check_vocabulary(source, given, tokenizer.get_vocab_size())
    if model is None:
        if tokenizer is None:
            log.warning("%s has no tokenizer.model and no tokenizer.json: the checkpoint has no tokenizer", source.path)
        return {}
    truth = load(model)
    check_vocabulary(source, model, truth.vocab_size())
    compare(truth, tokenizer or build(truth), model)
    hashes = {"tokenizer.model": copy_hashed(model, directory / "tokenizer.model")}
    if tokenizer is None:
        build(truth).save(str(directory / "tokenizer.json"))
        hashes["tokenizer.json"] = sha256(directory / "tokenizer.json")
    if not (source.path / "tokenizer_config.json").is_file():
        write_json(directory / "tokenizer_config.json", config(truth, source.shape.max_positions))
        hashes["tokenizer_config.json"] = sha256(directory / "tokenizer_config.json")
    return hashes


def check_vocabulary(source: TensorSource, file: Path, size: int) -> None:
    """UserError if the tokenizer has ids that the embedding has no rows for."""
    if size > source.shape.vocab:
        raise UserError(
            f"tokenizer and model vocabulary mismatch: {file} has {size} tokens, but the embedding in {source.path} has"
            f" {source.shape.vocab} rows: use the tokenizer that belongs to these weights"
        )
    if size < source.shape.vocab:
        log.warning("%s has %d tokens, the embedding in %s %d rows", file, size, source.path, source.shape.vocab)


def build(truth: sentencepiece.SentencePieceProcessor) -> Tokenizer:
    """The same pieces as a tokenizer of the `tokenizers` library: BPE, byte fallback, dummy prefix, as Llama's."""
    pieces = [truth.id_to_piece(number) for number in range(truth.vocab_size())]
    unknown = pieces[truth.unk_id()]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, merges(truth), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [pieces[n] for n in range(len(pieces)) if truth.is_control(n) or truth.is_unknown(n)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    if truth.bos_id() >= 0:
        bos = pieces[truth.bos_id()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, truth.bos_id())]
        )
    return tokenizer


def merges(truth: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first: the order in which SentencePiece merges."""
    normal = {
        truth.id_to_piece(number): number
        for number in range(truth.vocab_size())
        if not (truth.is_control(number) or truth.is_unknown(number) or truth.is_byte(number))
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


def compare(truth: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, model: Path) -> None:
    """UserError naming the first probe text whose ids differ."""
    for text in PROBES:
        expected, found = truth.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise UserError(
                f"{model} and the tokenizer.json for it disagree on the text {text!r}: {expected} and {found}:"
                " llmpipe makes a tokenizer.json of SentencePiece BPE with byte fallback, identity normalizer and dummy"
                " prefix; remove a tokenizer.json that came with the source to have it made anew"
            )


def _from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{path} is not a tokenizer of the tokenizers library ({error}): copy or download it again"
        ) from error

"""The tokenizer's files of a checkpoint: tokenizer.model is carried, tokenizer.json is made from it and proven.

SentencePiece's own answer is the truth where there is a tokenizer.model (design decision 7). transformers on a bare
tokenizer.model gives other ids, so a finished checkpoint carries a tokenizer.json of the same pieces, and a
tokenizer_config.json whose class makes transformers load exactly that file. Both ids are compared on PROBES.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llmpipe.checkpoint import carried, tiktoken_file
from llmpipe.checkpoint.carried import carried_files
from llmpipe.checkpoint.sentencepiece_model import SPACE, build, config, load, read_spec
from llmpipe.checkpoint.source import TensorSource
from llmpipe.checkpoint.tokenizer_folder import ADDED, CONFIG, JSON, MODEL, TEKKEN, folder, model_size, names, own_file
from llmpipe.data.tokenizers.ranks import is_tiktoken
from llmpipe.data.tokenizers.tekken import open_tekken
from llmpipe.data.tokenizers.tiktoken import open_ranks
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.files import sha256, write_json

log = logging.getLogger(__name__)

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


def opened(source: TensorSource) -> Tokenizer | None:
    """The tokenizer that a checkpoint made of this source carries as tokenizer.json; None without one."""
    place = folder(source.tokenizer_place)
    return opened_at(place, source.shape) if place else None


def opened_at(place: Path, shape: Shape) -> Tokenizer:
    """The tokenizer that a directory holds, for a model of that shape."""
    model = own_file(place)
    if model is None or (place / JSON).is_file():
        return from_file(place / JSON)
    made = _made(shape, model)[0]
    _add_listed(made, place, shape.vocab)
    return made


def size_of(tokenizer: Tokenizer) -> int:
    """How many rows its ids need."""
    ids = tokenizer.get_vocab().values()
    return max(len(ids), max(ids, default=-1) + 1)


def _add_listed(tokenizer: Tokenizer, place: Path, rows: int) -> None:
    """Add the tokens of added_tokens.json, which transformers wrote beside a tokenizer.model, at the ids there.

    `rows`: of the embedding; a token without one is left out.
    """
    listed = carried.read_table(place / ADDED) if (place / ADDED).is_file() else {}
    if wrong := [token for token, number in listed.items() if not isinstance(number, int)]:
        raise UserError(f"{place / ADDED}: {wrong[0]!r} has no number for its id: copy or download it again")
    for token, number in sorted(listed.items(), key=lambda entry: entry[1]):
        if number == tokenizer.get_vocab_size() < rows:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
    if left_out := [token for token, number in listed.items() if tokenizer.token_to_id(token) != number]:
        log.warning(
            "%s: %s left out: their ids do not follow the tokenizer's, or are beyond the embedding's %d rows",
            place / ADDED, ", ".join(left_out), rows,
        )  # fmt: skip


def _made(shape: Shape, model: Path) -> tuple[Tokenizer, dict[str, Any], Callable[[str], list[int]]]:
    """The tokenizer.json and tokenizer_config.json of a file of another kind, and the encoding that is the truth."""
    if model.name == TEKKEN:
        own = open_tekken(model)
        settings = tiktoken_file.config(shape.max_positions, "<s>", "</s>")
        return tiktoken_file.of_tekken(own), settings, own.encode
    if is_tiktoken(model):  # the names of some special tokens came with Llama 3.1, as did its rope scaling
        made = tiktoken_file.build(model, named=shape.rope_scaling is not None)
        settings = tiktoken_file.config(shape.max_positions)
        return made, settings, open_ranks(model).encode
    truth = load(model)
    return build(truth, model), config(truth, shape.max_positions), truth.encode


def carry(source: TensorSource, directory: Path) -> dict[str, str]:
    """Copy what goes along with a source's weights, its tokenizer from the folder above too; returns the SHA-256.

    UserError if the tokenizer is none, or has ids that the embedding has no rows for.
    """
    path = source.path
    place, others = folder(source.tokenizer_place), carried.names(path)
    if source.tokenizer_place != path:
        others = [name for name in others if name not in names(path)]
    hashes = carried_files(path, directory, others)
    if place is None:
        others = sorted(file.name for file in path.glob(f"{MODEL}.*"))
        hint = f"; if {others[-1]} is it, copy it to {MODEL} there" if others else ""
        log.warning("%s has no %s and no %s: the checkpoint has no tokenizer%s", path, MODEL, JSON, hint)
    elif place != path:
        log.info("the tokenizer of %s is taken", place)
        hashes |= carried_files(place, directory, names(place))
    if place and (model := own_file(place)):
        check_vocabulary(source, model, model_size(model))
    if place and (place / JSON).is_file():
        check_vocabulary(source, place / JSON, size_of(from_file(place / JSON)))
    return hashes


def complete(source: TensorSource, directory: Path) -> dict[str, str]:
    """Carry the tokenizer's and other files, and add what a checkpoint's tokenizer lacks; returns their SHA-256."""
    place, hashes = folder(source.tokenizer_place), carry(source, directory)
    if place is None:
        return hashes
    given, settings = (from_file(place / JSON) if (place / JSON).is_file() else None), dict[str, Any]()
    if given:
        settings = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if model := own_file(place):
        made, settings, encode = _made(source.shape, model)
        _hold_against(encode, given or made, model)
        if given is None:
            _add_listed(made, place, source.shape.vocab)
            made.save(str(directory / JSON))
            hashes[JSON] = sha256(directory / JSON)
    if not (place / CONFIG).is_file():
        write_json(directory / CONFIG, settings)
        hashes[CONFIG] = sha256(directory / CONFIG)
    return hashes


def _hold_against(encode: Callable[[str], list[int]], tokenizer: Tokenizer, model: Path) -> None:
    """`compare`; a warning alone where no tokenizer.json could be equal."""
    try:
        compare(encode, tokenizer, model)
    except UserError as error:
        if model.name == TEKKEN or is_tiktoken(model) or not read_spec(model).tied:
            raise
        log.warning(
            "%s; its pieces share scores, as in vocabularies that were extended, and no tokenizer.json can say that:"
            " transformers has other ids for some texts than llmpipe, which asks tokenizer.model", error,
        )  # fmt: skip


def check_vocabulary(source: TensorSource, file: Path, size: int) -> None:
    """UserError if the tokenizer has ids that the embedding has no rows for."""
    if size > source.shape.vocab:
        raise UserError(
            f"tokenizer and model vocabulary mismatch: {file} has {size} tokens, but the embedding in {source.path} has"
            f" {source.shape.vocab} rows: use the tokenizer that belongs to these weights"
        )
    if size < source.shape.vocab:
        log.warning("%s has %d tokens, the embedding in %s %d rows", file, size, source.path, source.shape.vocab)


def compare(encode: Callable[[str], list[int]], tokenizer: Tokenizer, model: Path) -> None:
    """UserError naming the first probe text whose ids differ.

    The name of a special token, as [INST] is one of Mistral's, is text here; transformers takes it for the token.
    """
    tokenizer.encode_special_tokens = True
    for text in PROBES:
        expected, found = encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise UserError(
                f"{model} and the tokenizer.json for it disagree on the text {text!r}: {expected} and {found}:"
                " a tokenizer.json that came with the source may be of another model: remove it to have it made anew;"
                " what llmpipe made cannot say this model's normalizer: put the makers' tokenizer.json in its place"
                f" and take {model.name} away"
            )
    tokenizer.encode_special_tokens = False


def from_file(path: Path) -> Tokenizer:
    """A tokenizer.json; UserError if the file is none."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{path} is not a tokenizer of the tokenizers library ({error}): copy or download it again"
        ) from error

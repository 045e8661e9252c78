"""Which tokenizer a model has after an adapter: the adapter's own, where the adapter resized the vocabulary.

Chinese-LLaMA and -Alpaca are released so: LoRA, an embedding and a head of more rows, and the tokenizer.model to them.
"""

import logging
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from llmpipe.checkpoint import tokenizer_files, tokenizer_folder
from llmpipe.checkpoint.adapter_files import FILES
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.files import sha256

log = logging.getLogger(__name__)


def place_of(source: TensorSource, directory: Path, rows: int) -> Path:
    """Where the tokenizer of a source lies whose embedding has `rows` rows with the adapter of a directory.

    UserError if the adapter resized the embedding, and the tokenizer has not as many tokens as rows, or other first
    ones than the source's.
    """
    base, own = tokenizer_folder.folder(source.path), tokenizer_folder.holds(directory)
    if rows == source.shape.vocab:
        if base and own:
            _warn_of_more(source, base, directory)
        return source.path
    place = directory if own else base
    if place is None:
        return source.path
    tokenizer = tokenizer_files.opened_at(place, replace(source.shape, vocab=rows))
    _check_size(place, tokenizer, directory, rows)
    if not own:
        return source.path
    if base:
        _check_begins(directory, tokenizer, base, source)
    log.info("the tokenizer of the adapter is taken: %s has %d tokens", tokenizer_folder.file_at(directory), rows)
    return directory


def hashes_of(directory: Path) -> dict[str, str]:
    """The SHA-256 of a tokenizer's files."""
    return {name: sha256(directory / name) for name in tokenizer_folder.names(directory)}


def _check_size(place: Path, tokenizer: Tokenizer, directory: Path, rows: int) -> None:
    if (tokens := tokenizer_files.size_of(tokenizer)) != rows:
        file = next(directory / name for name in FILES if (directory / name).is_file())
        raise UserError(
            f"{file} resized the embedding to {rows} rows, but {tokenizer_folder.file_at(place)} has {tokens} tokens:"
            f" put the tokenizer that the adapter was trained with into {directory}; if it has fewer as the rows"
            " were padded to a multiple, merge the adapter with PEFT's merge_and_unload and convert what that saves"
        )


def _check_begins(directory: Path, tokenizer: Tokenizer, base: Path, source: TensorSource) -> None:
    """UserError if a token with a row in the source has another id in the adapter's tokenizer."""
    before = tokenizer_files.opened_at(base, source.shape).get_vocab()
    for token, number in sorted(before.items(), key=lambda entry: entry[1]):
        if number < source.shape.vocab and (found := tokenizer.token_to_id(token)) != number:
            raise UserError(
                f"{tokenizer_folder.file_at(directory)} does not begin with the tokens of"
                f" {tokenizer_folder.file_at(base)}: {token!r} is {number} there and"
                f" {'not in it' if found is None else found} here: name the weights that the adapter was trained on, or"
                f" put the tokenizer that it was trained with into {directory}"
            )


def _warn_of_more(source: TensorSource, base: Path, directory: Path) -> None:
    """The source's tokenizer is carried; name the tokens which only the adapter's has."""
    theirs = tokenizer_files.opened_at(directory, source.shape).get_vocab()
    known = tokenizer_files.opened_at(base, source.shape).get_vocab()
    more = sorted((number, token) for token, number in theirs.items() if token not in known)
    if more:
        options = " ".join(f"--add-token {token!r}" for _, token in more[:8]) + (" ..." if len(more) > 8 else "")
        log.warning(
            "%s was trained with %d more tokens than %s has; the embedding has %d rows: %s",
            directory, len(more), source.path, source.shape.vocab, options,
        )  # fmt: skip

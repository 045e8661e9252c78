"""Chats as text with what is trained marked, for `llmpipe inspect --mask`."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click

from llmpipe.data.batches.fit import check_tokenizer
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.dataset.roles import ASSISTANT, read_roles, roles_prefix
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

MOST_TOKENS = 4096
OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained, where there are no colours."""


def masked_documents(prefix: Path, tokenizer_path: Path | None, count: int, colours: bool) -> str:
    """The first chats, control tokens by name; UserError without roles, or if another tokenizer made the tokens."""
    if not roles_prefix(prefix):
        raise UserError(f"{prefix} has no roles: it is text, and all of it is trained; chats are made with --chat")
    tokenizer, reader = open_tokenizer(tokenizer_path or _own_tokenizer(prefix)), Reader(prefix)
    check_tokenizer(prefix, tokenizer.path)
    roles, lines = read_roles(reader), []
    for number in range(min(count, reader.num_documents)):
        trained = roles.read(number) == ASSISTANT
        head = f"document {number}, {len(trained):,} tokens, {int(trained[1:].sum()):,} of them trained"
        ids = reader.read(number, 0, MOST_TOKENS).tolist()
        text = marked(ids, trained[:MOST_TOKENS].tolist(), tokenizer, colours)
        lines += [head, text + ("…" if len(trained) > MOST_TOKENS else ""), ""]
    return "\n".join(lines).rstrip()


def _own_tokenizer(prefix: Path) -> Path:
    """The tokenizer that the manifest names."""
    facts = manifest.read(prefix)
    path = Path(facts["tokenizer"]["path"]) if facts else None
    if path is None or not path.exists():
        raise UserError(f"the tokenizer of {prefix} is not known, or not at {path} any more: name it with --tokenizer")
    return path


def marked(ids: list[int], trained: list[bool], tokenizer: Tokenizer, colours: bool) -> str:
    """The text of tokens, what is trained in colour or in brackets."""
    shown = []
    for is_trained, parts in groupby(_parts(ids, trained, tokenizer), key=lambda part: part[1]):
        text = "".join(text for text, _ in parts)
        if is_trained:
            text = click.style(text, fg="green", underline=True) if colours else OPEN + text + CLOSE
        shown.append(text)
    return "".join(shown)


def _parts(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Texts, and whether they are trained: control tokens, and what stands between them, cut at the mask's borders."""
    names = {number: name for name, number in tokenizer.special.items()}
    for is_control, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[0] in names):
        pairs = list(run)
        if is_control:
            yield from ((names[number], is_trained) for number, is_trained in pairs)
            continue
        run_ids = [number for number, _ in pairs]
        text, position, start = tokenizer.decode(run_ids), 0, 0
        for is_trained, same in groupby(pairs, key=lambda pair: pair[1]):
            position += len(list(same))
            end = len(tokenizer.decode(run_ids[:position])) if position < len(run_ids) else len(text)
            yield text[start:end], is_trained
            start = end

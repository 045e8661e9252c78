"""Rows of chats to documents with roles: the encoder of a corpus of the kind chat."""

import hashlib
from collections.abc import Sequence
from typing import Any

from llmpipe.config import Corpus
from llmpipe.data.chat.conversation import check_fields, read_conversation
from llmpipe.data.chat.encode import ConversationEncoder
from llmpipe.data.chat.length import fit
from llmpipe.data.chat.templates import open_template
from llmpipe.data.dataset.roles import ASSISTANT, TEMPLATE, USER
from llmpipe.data.encoding.documents import of_each
from llmpipe.data.encoding.fields import encode as encode_fields
from llmpipe.data.encoding.fields import parse
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

Document = tuple[list[int], list[int]]
"""Ids and roles."""


class ChatEncoder:
    """Conversations by a template, over-long ones split or left out by the corpus's rule."""

    keys: Sequence[str] = ()
    optional: Sequence[str] = ()
    has_roles = True
    append_eod = False  # a turn ends with its own stop token

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        assert isinstance(corpus.fields, dict), corpus.fields
        check_fields(corpus.fields)
        template = open_template(corpus.template, tokenizer)
        self.fields, self.max_length, self.split = corpus.fields, corpus.max_length, corpus.over_long == "split"
        self.encoder = ConversationEncoder(tokenizer, template, corpus.bos)
        self.bos = self.encoder.bos
        texts = template.text + (template.with_tools or "")
        self.facts = {
            "fields": corpus.fields,
            "template": template.name,
            "template_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "max_length": corpus.max_length,
            "over_long": corpus.over_long,
        }

    def encode(self, rows: list[Any]) -> list[list[Document | None] | BadRow]:
        return of_each(rows, self._documents)

    def _documents(self, row: Any) -> list[Document | None]:
        conversation = read_conversation(row, self.fields)
        found = fit(conversation, self.encoder.encode, self.max_length, self.split)
        return [(document.ids, document.roles) if document else None for document in found]


class FieldEncoder:
    """Rows by EasyLM's grammar, which needs no template: BOS, the fields, EOS, unless the corpus says otherwise."""

    keys: Sequence[str] = ()
    optional: Sequence[str] = ()
    has_roles = True

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        assert isinstance(corpus.fields, str), corpus.fields
        if corpus.template:
            raise UserError(f"fields {corpus.fields!r} is EasyLM's grammar, which says it all: leave out the template")
        self.fields, self.tokenizer, self.max_length = parse(corpus.fields), tokenizer, corpus.max_length
        self.bos = tokenizer.bos_id >= 0 if corpus.bos is None else corpus.bos
        self.append_eod = corpus.append_eod
        for asked, token, name in ((self.bos, tokenizer.bos_id, "bos"), (self.append_eod, tokenizer.eos_id, "eos")):
            if asked and token < 0:
                option = "bos: false" if name == "bos" else "append_eod: false"
                raise UserError(f"{tokenizer.path} has no {name.upper()} token: say {option}")
        self.facts = {"fields": corpus.fields, "max_length": corpus.max_length}

    def encode(self, rows: list[Any]) -> list[list[Document | None] | BadRow]:
        return of_each(rows, self._documents)

    def _documents(self, row: Any) -> list[Document | None]:
        ids, trained = encode_fields(row, self.fields, self.tokenizer)
        bos, eod = [self.tokenizer.bos_id] * self.bos, [self.tokenizer.eos_id] * self.append_eod
        roles = [TEMPLATE] * len(bos) + [ASSISTANT if count else USER for count in trained] + [ASSISTANT] * len(eod)
        ids = bos + ids + eod
        return [(ids, roles) if self.max_length is None or len(ids) <= self.max_length else None]


def chat_encoder(corpus: Corpus, tokenizer: Tokenizer) -> ChatEncoder | FieldEncoder:
    """By what the corpus's `fields` say."""
    return (FieldEncoder if isinstance(corpus.fields, str) else ChatEncoder)(corpus, tokenizer)

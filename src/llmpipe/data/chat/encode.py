"""A conversation's tokens and whose each is: control tokens by their ids, all between them as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmpipe.data.chat.conversation import Conversation
from llmpipe.data.chat.templates import Template
from llmpipe.data.chat.turns import ControlTokens, Rendered, find_turns
from llmpipe.data.dataset.roles import ASSISTANT, TEMPLATE, USER
from llmpipe.data.encoding.documents import encoded
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizers import beside
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

PROBES = ("\n", "\x01", "\x02")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document: its ids and the role of each."""

    ids: list[int]
    roles: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class ConversationEncoder:
    """Conversations to tokens, by one template with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template: Template, bos: bool | None = None):
        """`bos` None: a conversation begins with BOS where the template or the tokenizer's own rule says so."""
        self.tokenizer, self.template = tokenizer, template
        self.control = ControlTokens([*tokenizer.special])
        self.bos = (tokenizer.add_bos and tokenizer.bos_id >= 0) if bos is None else bos
        self.forbids_bos = bos is False
        if self.bos and tokenizer.bos_id < 0:
            raise UserError(f"{tokenizer.path} has no BOS token to begin chats with: say bos: false")
        self.takes_space_before, self.takes_space_after = _spaces_around(tokenizer)
        self.spaces_first_only = template.is_own and _spaces_first_only(tokenizer)

    def encode(self, conversation: Conversation) -> Encoded:
        """One conversation; BadRow if the template refuses it, or it cannot be told what the assistant writes."""
        import jinja2  # here, because texts are tokenized without it

        try:
            rendered = find_turns(self.template, conversation, self.control)
        except jinja2.TemplateError as error:
            raise BadRow(f"is refused by the template {self.template.name}: {error}") from error
        encoded(rendered.text)  # may have half of a surrogate pair
        ids: list[int] = []
        roles: list[int] = []
        for more_ids, more_roles in self._parts(rendered):
            ids += more_ids
            roles += more_roles
        return self._with_bos(ids, roles)

    def _with_bos(self, ids: list[int], roles: list[int]) -> Encoded:
        """Exactly one BOS at the beginning, or none where it is not wanted."""
        bos, count = self.tokenizer.bos_id, 0
        while bos >= 0 and ids[count : count + 1] == [bos]:
            count += 1
        wanted = 0 if self.forbids_bos else int(self.bos or count > 0)
        return Encoded([bos] * wanted + ids[count:], [TEMPLATE] * wanted + roles[count:])

    def _parts(self, rendered: Rendered) -> Iterator[tuple[list[int], list[int]]]:
        """Control tokens and the runs of text between them, as ids and roles."""
        roles, text, start = _roles(rendered), rendered.text, 0
        for match in self.control.pattern.finditer(text):
            name, end = match[1], match.start()
            if name in self.takes_space_before:
                end = max(start, len(text[:end].rstrip()))
            yield self._run(rendered, roles, start, end)
            yield [self.tokenizer.special[name]], [int(roles[match.start()])]
            start = match.end()
            if name in self.takes_space_after:
                start = len(text) - len(text[start:].lstrip())
        yield self._run(rendered, roles, start, len(text))

    def _run(self, rendered: Rendered, roles: NDArray[np.uint8], start: int, end: int) -> tuple[list[int], list[int]]:
        """The text between two control tokens, encoded as a whole, as transformers does."""
        shown = rendered.text[start:end]
        kept = [character != rendered.shield for character in shown]
        text, own = shown.replace(rendered.shield, ""), roles[start:end][kept]
        if not text:
            return [], []
        first = start == 0 or not self.spaces_first_only
        ids, borders = self._encode(text, first), _borders(own)
        if len(borders) == 1:
            return ids, [borders[0][1]] * len(ids)
        found = self._token_roles(text, ids, borders, first)
        return (ids, found) if found else self._apart(text, borders, first)

    def _encode(self, text: str, first: bool) -> list[int]:
        """The ids of a run of text; only what comes `first` gets the space that SentencePiece puts before a text."""
        if first:
            return self.tokenizer.encode(text)
        for probe in PROBES:  # a text before it, which merges with nothing, takes the space that would be put there
            before, ids = self.tokenizer.encode(probe), self.tokenizer.encode(probe + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        raise UserError(f"{self.tokenizer.path} joins every probe with the text after it: {text[:40]!r}")

    def _token_roles(self, text: str, ids: list[int], borders: list[tuple[int, int]], first: bool) -> list[int] | None:
        """The role of each token, the higher one across a border; None if the ids do not give back the text."""
        lost = len(text) - len(self.tokenizer.decode(ids))
        if lost not in (0, int(text.startswith(" "))):  # a first space is not decoded where it was put there
            return None

        def covered(count: int) -> int:
            """How many characters the first tokens make; half a character is none."""
            return lost + len(self.tokenizer.decode(ids[:count]).rstrip("\ufffd"))

        roles = [borders[0][1]] * len(ids)
        for (_, before), (border, after) in pairwise(borders):
            cut = min(len(self._encode(text[:border], first)), len(ids))  # nearly, and then exactly
            while cut and covered(cut - 1) >= border:
                cut -= 1
            while cut < len(ids) and covered(cut) < border:
                cut += 1
            if covered(cut) > border and after > before:
                cut -= 1
            roles[cut:] = [after] * (len(ids) - cut)
        return roles

    def _apart(self, text: str, borders: list[tuple[int, int]], first: bool) -> tuple[list[int], list[int]]:
        """Each role's part on its own: for tokenizers that change the text, so that no border can be found in it."""
        ids: list[int] = []
        roles: list[int] = []
        for (start, role), (end, _) in pairwise([*borders, (len(text), 0)]):
            more = self._encode(text[start:end], first and start == 0)
            ids += more
            roles += [role] * len(more)
        return ids, roles


def _roles(rendered: Rendered) -> NDArray[np.uint8]:
    """The role of each character."""
    roles = np.full(len(rendered.text), TEMPLATE, np.uint8)
    for spans, role in ((rendered.user, USER), (rendered.assistant, ASSISTANT)):
        for start, end in spans:
            roles[start:end] = role
    return roles


def _borders(roles: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Where each role begins, and which: the first at 0."""
    starts = [0, *(np.flatnonzero(np.diff(roles)) + 1).tolist()]
    return [(start, int(roles[start])) for start in starts]


def _spaces_around(tokenizer: Tokenizer) -> tuple[set[str], set[str]]:
    """The added tokens that take white space before them, and after them, with them."""
    folder = tokenizer.path.parent
    added = [*(beside.read(folder / beside.CONFIG).get("added_tokens_decoder") or {}).values()]
    added += beside.read(folder / beside.JSON).get("added_tokens") or []
    before, after = ({token["content"] for token in added if token.get(side)} for side in ("lstrip", "rstrip"))
    return before, after


def _spaces_first_only(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts SentencePiece's first space at the text's beginning alone, and not behind control
    tokens."""
    return not beside.read(tokenizer.path.parent / beside.CONFIG).get("legacy", False)

"""Where the turns lie in a rendered conversation: what the assistant has to write, and what users and tools wrote.

The conversation's own texts are *shielded* before they go through the template: a character that occurs nowhere else is
put into everything in them that looks like a control token, so that only the template's control tokens are such.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmpipe.data.chat.conversation import Conversation
from llmpipe.data.chat.templates import Template
from llmpipe.data.readers.block import BadRow

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as one text, with its turns."""

    text: str
    """With shields: a control token's name in it is one that the template wrote."""
    shield: str
    """The character to take out of what is no control token."""
    assistant: list[Span]
    """What is generated, each turn's stop token included."""
    user: list[Span]
    """The text of users and tools; empty where a template changes it beyond recognition."""


class ControlTokens:
    """A tokenizer's control tokens in texts."""

    def __init__(self, names: list[str]):
        self.names = sorted(filter(None, names), key=len, reverse=True)  # the longest first

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any control token, in a group of its own."""
        return re.compile(f"({'|'.join(map(re.escape, self.names))})" if self.names else r"((?!))")

    @cached_property
    def _beginning(self) -> re.Pattern[str]:
        """The beginning of a control token at the end of a text, where what follows could complete it."""
        starts = {name[:end] for name in self.names for end in range(1, len(name))}
        options = "|".join(map(re.escape, sorted(starts, key=len, reverse=True)))
        return re.compile(rf"({options})(?=\s*\Z)" if options else r"((?!))")

    def shielded(self, text: str, shield: str) -> str:
        """The text with the shield behind the first character of all that looks like a control token."""
        for pattern in (self.pattern, self._beginning):
            text = pattern.sub(lambda match: match[0][0] + shield + match[0][1:], text)
        return text


def find_turns(template: Template, conversation: Conversation, control: ControlTokens) -> Rendered:
    """Render the conversation; BadRow where it cannot be told soundly what the assistant writes.

    A template's own refusal is a jinja2.TemplateError.
    """
    shield, opening, closing = _unused_characters(conversation)
    chat = _mapped(conversation, lambda text: control.shielded(text, shield))
    _check_calls(template, chat)
    text, marked = template.render(chat)
    if template.marks_generation(chat):
        assistant = [_with_stop(text, span, control) for span in marked if span[0] < span[1]]
    else:
        assistant = _by_prefixes(template, chat, text, control)
    return Rendered(text, shield, assistant, _user_texts(template, chat, text, opening, closing))


def _check_calls(template: Template, chat: Conversation) -> None:
    """BadRow for calls of tools that the template would leave out."""
    calls = [call for message in chat.messages for call in message.get("tool_calls", [])]
    answers = any(message["role"] == "tool" for message in chat.messages)
    if (chat.tools or calls or answers) and not template.has_tools:
        raise BadRow(f"has tools, for which the template {template.name} has no form: take the tokenizer's own")


def _with_stop(text: str, span: Span, control: ControlTokens) -> Span:
    """A marked span, up to the stop token that follows where the template leaves it outside; BadRow without one."""
    start, end = span
    if last_control(text[start:end], control):
        return span
    follows = control.pattern.match(text, end)
    if not follows:
        raise _no_stop(text[start:end])
    return start, follows.end()


def last_control(text: str, control: ControlTokens) -> str | None:
    """The control token that a text ends with, white space after it aside."""
    stripped = text.rstrip()
    return next((name for name in control.names if stripped.endswith(name.rstrip())), None)


def _no_stop(text: str) -> BadRow:
    return BadRow(
        f"cannot be trained on: the template ends the assistant's turn {text[-40:]!r} without a stop token: a model"
        " trained so would never stop"
    )


def _by_prefixes(template: Template, chat: Conversation, text: str, control: ControlTokens) -> list[Span]:
    """What is generated, from renderings of the conversation's beginnings: they have to be beginnings of the whole."""
    found: list[Span] = []
    for number, message in enumerate(chat.messages):
        if message["role"] == "assistant":
            head = _beginning(template, chat, number)
            if not text.startswith(head) or (found and len(head) < found[-1][1]):
                raise BadRow(
                    f"cannot be trained on: the template has no {{% generation %}} marks, and what comes before turn"
                    f" {number + 1} is rendered"
                    " otherwise without that turn: what the assistant writes cannot be told. Put the marks into the"
                    " template, or take a named one"
                )
            found.append((len(head), _turn_end(template, chat, number, text, head, control)))
    return found


def _beginning(template: Template, chat: Conversation, number: int) -> str:
    """All before a turn of the assistant, with the words that ask for it."""
    if number == 0:
        raise BadRow("begins with the assistant, which needs a template with {% generation %} marks: take a named one")
    return template.render(Conversation(chat.messages[:number], chat.tools), ask=True)[0]


def _turn_end(template: Template, chat: Conversation, number: int, text: str, head: str, control: ControlTokens) -> int:
    """Where a turn of the assistant ends: behind its stop token, which is the one that it ends with as the last turn.

    A turn may hold the same token more than once; what other turns say of it is shielded.
    """
    alone = template.render(Conversation(chat.messages[: number + 1], chat.tools))[0]
    stop = last_control(alone[len(head) :], control)
    if not alone.startswith(head) or not stop:
        raise _no_stop(alone[len(head) :])
    end = len(head)
    for _ in range(alone.count(stop, len(head))):
        end = text.find(stop, end) + len(stop)
        if end < len(stop):
            raise BadRow(f"cannot be trained on: turn {number + 1} ends otherwise when others follow")
    return end


def _user_texts(template: Template, chat: Conversation, text: str, opening: str, closing: str) -> list[Span]:
    """What users and tools wrote: it is rendered once more between marks, which must change nothing else."""

    def marked(message: dict[str, Any]) -> dict[str, Any]:
        core = message["content"].strip()
        if message["role"] not in ("user", "tool") or not core:
            return message
        return message | {"content": message["content"].replace(core, opening + core + closing, 1)}

    shown, _ = template.render(Conversation([*map(marked, chat.messages)], chat.tools))
    spans: list[Span] = []
    position = 0
    for part in re.split(f"({opening}[^{opening}{closing}]*{closing})", shown):
        length = len(part.removeprefix(opening).removesuffix(closing))
        if length != len(part):
            spans.append((position, position + length))
        position += length
    return spans if shown.replace(opening, "").replace(closing, "") == text else []


def _unused_characters(conversation: Conversation) -> list[str]:
    """Three characters that the conversation has nowhere."""
    seen = set(repr((conversation.messages, conversation.tools)))
    _mapped(conversation, lambda text: (seen.update(text), text)[1])
    candidates = (chr(number) for start in (0xFDD0, 0xE000) for number in range(start, start + 32))
    return [character for character in candidates if character not in seen][:3]


def _mapped(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every text in it changed, but the names of roles and keys of turns."""

    def mapped(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [mapped(item) for item in value]
        if isinstance(value, dict):
            return {change(key): mapped(item) for key, item in value.items()}
        return value

    messages = [
        {key: item if key == "role" else mapped(item) for key, item in m.items()} for m in conversation.messages
    ]
    return Conversation(messages, mapped(conversation.tools))

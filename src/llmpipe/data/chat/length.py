"""Conversations that have more tokens than they may: split between turns, or left out; never cut within one."""

from collections.abc import Callable

from llmpipe.data.chat.conversation import Conversation, Message
from llmpipe.data.chat.encode import Encoded

Encode = Callable[[Conversation], Encoded]


def fit(conversation: Conversation, encode: Encode, max_length: int | None, split: bool) -> list[Encoded | None]:
    """The documents of a conversation: itself where it fits, else its parts if it may be `split`; None is left out.

    A part is as many exchanges (a user's turn and all up to the next one) as fit, after the system's turn, which each
    part has. An exchange that does not fit alone is left out.
    """
    whole = encode(conversation)
    if max_length is None or len(whole) <= max_length:
        return [whole]
    system, exchanges = _exchanges(conversation.messages)
    if not split or len(exchanges) < 2:
        return [None]
    parts: list[Encoded | None] = []
    begun: list[Message] = []
    last: Encoded | None = None  # of what is begun; None: it does not fit
    for exchange in exchanges:
        longer = _within([*begun, *exchange], system, conversation, encode, max_length) if last or not begun else None
        if longer is None and begun:
            parts.append(last)
            begun, longer = [], _within(exchange, system, conversation, encode, max_length)
        begun, last = [*begun, *exchange], longer
    return [*parts, last]


def _within(
    messages: list[Message], system: list[Message], conversation: Conversation, encode: Encode, max_length: int
) -> Encoded | None:
    """A part's tokens; None if they are too many, or nothing of them would be trained."""
    if not any(message["role"] == "assistant" for message in messages):
        return None
    found = encode(Conversation([*system, *messages], conversation.tools))
    return found if len(found) <= max_length else None


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system's turns at the beginning, and each user's turn with what follows it."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for message in messages[first:]:
        if not exchanges or (message["role"] == "user" and exchanges[-1][-1]["role"] != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
    return messages[:first], exchanges

"""Rows of chat data as conversations: `messages`, ShareGPT, Alpaca, or keys that the corpus names under `fields`.

{"messages": [{"role": "user", "content": "…"}, …], "tools": […]}
{"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}
{"instruction": "…", "input": "…", "output": "…"}
{"question": "…", "answer": "…", "system": "…"}
"""

import json
from dataclasses import dataclass
from typing import Any

from llmpipe.data.encoding.documents import kind_of, value
from llmpipe.data.readers.block import BadRow
from llmpipe.errors import UserError, nearest

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""What data sets call a role, and what templates call it."""
FIELDS = ("user", "assistant", "system", "messages", "role", "content", "tools")
DETECTED = ({"user": "question", "assistant": "answer"}, {"user": "prompt", "assistant": "completion"})
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in the form that chat templates take."""

    messages: list[Message]
    """Each with `role` (system, user, assistant, tool) and `content`, and what else a template may read."""
    tools: list[Row] | None = None
    """Descriptions of the functions that the assistant may call."""


def check_fields(fields: dict[str, str]) -> None:
    """UserError for a corpus's `fields` that describe no conversation."""
    for name in fields:
        if name not in FIELDS:
            raise UserError(f"fields has the unknown key {name!r}: {nearest(name, FIELDS)}")
    if fields and ("messages" in fields) == ({"user", "assistant"} <= fields.keys()):
        raise UserError(
            f"fields is {fields}, but has to name the keys of one turn, as {{user: question, assistant: answer}},"
            " or the key of a list of turns, as {messages: dialog, role: speaker, content: text}"
        )


def read_conversation(row: Row, fields: dict[str, str]) -> Conversation:
    """The conversation of a row; BadRow for anything else.

    Without `fields` the kind is told by the row's keys.
    """
    if not isinstance(row, dict):
        raise BadRow(f"is {kind_of(row)}, but each chat has to be an object")
    fields = fields or _detect(row)
    if "messages" in fields:
        messages = _messages(row, fields)
    elif "instruction" in fields:
        messages = _alpaca(row)
    else:
        messages = _pair(row, fields)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("has no turn of the assistant: nothing of it would be trained; leave it out")
    return Conversation(messages, _tools(row, fields.get("tools", "tools")))


def _detect(row: Row) -> dict[str, str]:
    """The fields of a known kind of row."""
    if "messages" in row:
        return {"messages": "messages"}
    if "conversations" in row:
        return {"messages": "conversations"}
    if {"instruction", "output"} <= row.keys():
        return {"instruction": "instruction"}
    for fields in DETECTED:
        if set(fields.values()) <= row.keys():
            return fields | ({"system": "system"} if "system" in row else {})
    keys = ", ".join(map(repr, row)) or "none"
    raise BadRow(
        f"is no chat of a known kind, its keys are {keys}: known are messages, conversations (ShareGPT),"
        " instruction and output (Alpaca), question and answer, prompt and completion; or name its keys with"
        " fields: {user: …, assistant: …} in the corpus's file"
    )


def _pair(row: Row, fields: dict[str, str]) -> list[Message]:
    """One question and one answer."""
    named = [(role, fields[role]) for role in ("system", "user", "assistant") if role in fields]
    texts = [(role, text_of(row, key, optional=role == "system")) for role, key in named]
    return [{"role": role, "content": text} for role, text in texts if text or role != "system"]


def _alpaca(row: Row) -> list[Message]:
    """Stanford Alpaca's published prompt, which differs with and without an input."""
    texts = {key: text_of(row, key, optional=key == "input") for key in ("instruction", "input", "output")}
    prompt = (ALPACA_WITH_INPUT if texts["input"] else ALPACA).format(**texts)
    found = [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts["output"]}]
    system = text_of(row, "system", optional=True)
    return [{"role": "system", "content": system}, *found] if system else found


def text_of(row: Row, key: str, optional: bool = False) -> str:
    """The text under a key; BadRow if there is none. An optional one may be missing or null: then it is empty."""
    if optional and row.get(key) is None:
        return ""
    found = value(row, key)
    if not isinstance(found, str):
        raise BadRow(f"has {_shown(found)} under {key!r}, but it has to be a text")
    return found


def _messages(row: Row, fields: dict[str, str]) -> list[Message]:
    """A list of turns, of OpenAI's kind or ShareGPT's."""
    key = fields["messages"]
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"has {_shown(turns)} under {key!r}, but it has to be a list of turns")
    found = [_numbered(number, turn, fields) for number, turn in enumerate(turns, start=1)]
    system = row.get(fields.get("system", "system"))
    if isinstance(system, str) and system and found[0]["role"] != "system":
        return [{"role": "system", "content": system}, *found]
    return found


def _numbered(number: int, turn: Any, fields: dict[str, str]) -> Message:
    try:
        return _message(turn, fields)
    except BadRow as error:
        raise BadRow(f"in turn {number} {error}") from error


def _message(turn: Any, fields: dict[str, str]) -> Message:
    """One turn: `role` and `content`, or `from` and `value`, or the keys that `fields` names."""
    if not isinstance(turn, dict):
        raise BadRow(f'is {_shown(turn)}, but has to be an object as {{"role": "user", "content": "…"}}')
    role_key = fields.get("role", "from" if "from" in turn else "role")
    content_key = fields.get("content", "value" if "from" in turn else "content")
    named = turn.get(role_key)
    if not isinstance(named, str) or named not in ROLES:
        raise BadRow(f"has {_shown(named)} under {role_key!r}, but it has to be one of {', '.join(ROLES)}")
    message = {key: value for key, value in turn.items() if key not in (role_key, content_key) and value is not None}
    content = turn.get(content_key)
    if named == "function_call":  # ShareGPT's way to write a call
        return message | {"role": "assistant", "content": "", "tool_calls": [_call(content)]}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _calls(calls)
    return message | {"role": ROLES[named], "content": _content(content, bool(calls), content_key)}


def _content(content: Any, may_be_empty: bool, key: str) -> str:
    """A turn's text; of a list of parts, which have to be texts, all of them."""
    if content is None and may_be_empty:
        return ""
    parts = content if isinstance(content, list) and content else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    good = [text for text in texts if isinstance(text, str)]
    if len(good) < len(texts):
        raise BadRow(f"has {_shown(content)} under {key!r}, but it has to be a text")
    return "".join(good)


def _calls(calls: Any) -> list[Row]:
    if not isinstance(calls, list):
        raise BadRow(f"has {_shown(calls)} under 'tool_calls', but it has to be a list")
    return [_call(call) for call in calls]


def _call(call: Any) -> Row:
    """A call of a function as templates take it: its arguments an object, not OpenAI's JSON text."""
    call = _parsed(call)
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise BadRow(f"has the tool call {_shown(call)}, but it has to have a function's name and arguments")
    function = inner | {"arguments": _parsed(inner.get("arguments", {}))}
    more = {key: call[key] for key in ("id",) if "function" in call and key in call}
    return {"type": "function", "function": function, **more}


def _tools(row: Row, key: str) -> list[Row] | None:
    tools = _parsed(row.get(key))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"has {_shown(tools)} under {key!r}, but it has to be a list of functions' descriptions")
    return tools


def _parsed(value: Any) -> Any:
    """What a JSON text says; tables of data sets often hold objects as such."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return "nothing" if value is None else shown if len(shown) <= 60 else shown[:60] + "…"

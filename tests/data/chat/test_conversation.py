"""Rows of every kind, each written out as the messages that it stands for, and rows that are wrong."""

from typing import Any

import pytest

from llmpipe.data.chat.conversation import Conversation, check_fields, read_conversation
from llmpipe.data.readers.block import BadRow
from llmpipe.errors import UserError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\ndo\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def alpaca(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": "done"}]


@pytest.mark.parametrize(
    ("row", "fields", "messages"),
    [
        ({"messages": PAIR}, {}, PAIR),
        ({"messages": PAIR, "system": "s"}, {}, [SYSTEM, *PAIR]),
        ({"messages": [SYSTEM, *PAIR], "system": "other"}, {}, [SYSTEM, *PAIR]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PAIR[1]]}, {}, PAIR),
        ({"messages": [{"role": "user", "content": "q", "name": None}, PAIR[1]]}, {}, PAIR),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {}, PAIR),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            {},
            [SYSTEM, *PAIR],
        ),
        ({"instruction": "do", "input": "", "output": "done"}, {}, alpaca(ALPACA)),
        ({"instruction": "do", "output": "done"}, {}, alpaca(ALPACA)),
        ({"instruction": "do", "input": "this", "output": "done"}, {}, alpaca(ALPACA_INPUT)),
        ({"question": "q", "answer": "a", "more": 1}, {}, PAIR),
        ({"question": "q", "answer": "a", "system": "s"}, {}, [SYSTEM, *PAIR]),
        ({"question": "q", "answer": "a", "system": None}, {}, PAIR),
        ({"prompt": "q", "completion": "a"}, {}, PAIR),
        ({"x": "q", "y": "a", "z": "s"}, {"user": "x", "assistant": "y", "system": "z"}, [SYSTEM, *PAIR]),
        ({"input": "q", "output": "a", "instruction": "s"}, {"user": "input", "assistant": "output"}, PAIR),
        (
            {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}]},
            {"messages": "dialog", "role": "speaker", "content": "text"},
            PAIR,
        ),
    ],
)
def test_rows(row: dict[str, Any], fields: dict[str, str], messages: list[dict[str, Any]]) -> None:
    check_fields(fields)
    assert read_conversation(row, fields) == Conversation(messages)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ],
)
def test_calls_of_tools_in_every_form(turn: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, '[{"type": "function", "function": {"name": "add"}}]'):
        row = {"messages": [PAIR[0], turn, {"role": "tool", "content": "1"}], "tools": given}
        found = read_conversation(row, {})
        assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert found.messages[2] == {"role": "tool", "content": "1"} and found.tools == tools


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ("text", {}, "is a text, but each chat has to be an object"),
        ({"text": "x"}, {}, "is no chat of a known kind, its keys are 'text': known are messages,"),
        ({"messages": []}, {}, "has [] under 'messages', but it has to be a list of turns"),
        ({"messages": "x"}, {}, "has \"x\" under 'messages', but it has to be a list of turns"),
        ({"messages": ["x"]}, {}, "in turn 1 is \"x\", but has to be an object"),
        ({"messages": [{"role": "robot", "content": ""}]}, {}, "in turn 1 has \"robot\" under 'role', but it has"),
        ({"messages": [{"role": [], "content": ""}]}, {}, "in turn 1 has [] under 'role', but it has to be one of"),
        ({"messages": [{"content": ""}]}, {}, "in turn 1 has nothing under 'role', but it has to be one of system"),
        ({"messages": [PAIR[0], {"role": "assistant"}]}, {}, "in turn 2 has nothing under 'content', but it has"),
        ({"messages": [PAIR[0], {"role": "assistant", "content": 5}]}, {}, "has 5 under 'content', but it has"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, 'has [{"type": "image"}] under'),
        ({"messages": PAIR[:1]}, {}, "has no turn of the assistant: nothing of it would be trained; leave it out"),
        ({"messages": PAIR, "tools": "x"}, {}, "has \"x\" under 'tools', but it has to be a list of functions'"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, {}, "has the tool call 5, but it has to have a"),
        ({"question": "q", "answr": "a"}, {"user": "question", "assistant": "answer"},
         "has no key 'answer', its keys are 'question', 'answr'; did you mean 'answr'?"),
        ({"question": "q", "answer": None}, {}, "has nothing under 'answer', but it has to be a text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(row: Any, fields: dict[str, str], message: str) -> None:
    with pytest.raises(BadRow) as error:
        read_conversation(row, fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"usr": "question"}, "fields has the unknown key 'usr': did you mean 'user'?"),
        (
            {"user": "question"},
            "but has to name the keys of one turn, as {user: question, assistant: answer}, or the key",
        ),
        ({"user": "q", "assistant": "a", "messages": "m"}, "but has to name the keys of one turn"),
    ],
)
def test_fields_that_describe_nothing(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_fields(fields)
    assert message in str(error.value)

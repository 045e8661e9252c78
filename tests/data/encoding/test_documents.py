"""The text of a row by its keys, and what is said of rows without one."""

from typing import Any

import pytest

from llmpipe.data.encoding.documents import document
from llmpipe.data.readers.block import BadRow, Repeated, WholeText

ROW = {
    "title": "One",
    "text": "two \u00e9",
    "empty": "",
    "meta": {"a": {"b": "deep"}},
    "x.y": "dotted",
    "raw": b"caf\xc3\xa9",
}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["text"], "two \u00e9"),
        (["title", "text"], "One\n--\ntwo \u00e9"),
        (["title", "empty", "text"], "One\n--\ntwo \u00e9"),
        (["empty", "empty"], ""),
        (["meta.a.b"], "deep"),
        (["x.y"], "dotted"),
        (["raw"], "caf\u00e9"),
    ],
)
def test_texts(keys: list[str], expected: str) -> None:
    assert document(ROW, keys, "\n--\n") == expected.encode()


def test_a_row_that_is_a_text_is_the_document() -> None:
    assert document(WholeText("as it is\n"), ["text"], "") == b"as it is\n"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a"], 'is a list, but each row has to be an object like {"text": "…"}'),
        (12, 'is a number, but each row has to be an object like {"text": "…"}'),
        ("a text", 'is a text, but each row has to be an object like {"text": "…"}'),
        (WholeText("a"), None),
        (Repeated([("text", "a"), ("text", "b")]), "has the key 'text' more than once"),
        (Repeated([("text", "a"), ("other", 1), ("other", 2)]), None),
        (
            {f"key {i}": 1 for i in range(1000)},
            f"has no key 'text', its keys are {', '.join(map(repr, (f'key {i}' for i in range(20))))} and 980 more"
            " (--text-key, or text_key in the corpus)",
        ),
        (None, 'is null, but each row has to be an object like {"text": "…"}'),
        (True, 'is true or false, but each row has to be an object like {"text": "…"}'),
        (
            {"id": 1, "txt": "a"},
            "has no key 'text', its keys are 'id', 'txt'; did you mean 'txt'? (--text-key, or text_key in the corpus)",
        ),
        ({}, "has no key 'text', its keys are none (--text-key, or text_key in the corpus)"),
        ({"text": 12}, "has a number under 'text', but it has to be a text: '12'"),
        ({"text": None}, "has null under 'text', but it has to be a text: 'None'"),
        ({"text": {"a": 1}}, "has an object under 'text', but it has to be a text: \"{'a': 1}\""),
        ({"text": b"caf\xe9"}, "is not UTF-8: byte 0xE9 in 'text'"),
        (
            {"text": "ab\ud83d"},
            "has half of a surrogate pair in its text, U+D83D at character 3; mend or leave out the row",
        ),
    ],
)
def test_rows_without_a_text(row: Any, message: str | None) -> None:
    if message is None:
        assert document(row, ["text"], "") == b"a"
        return
    with pytest.raises(BadRow) as error:
        document(row, ["text"], "")
    assert str(error.value) == message


def test_a_key_path_that_ends_early() -> None:
    with pytest.raises(BadRow, match="has no key 'c', its keys are 'b'"):
        document(ROW, ["meta.a.c"], "")
    with pytest.raises(BadRow, match=r"has no key 'text\.a', its keys are 'title'"):
        document(ROW, ["text.a"], "")

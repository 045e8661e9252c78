"""The compiled reader of JSON lines against Python's json, line by line and through the whole command."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adversarial import texts
from data_help import train

from llmpipe import helpers
from llmpipe.config import Corpus
from llmpipe.data.dataset.manifest import rejects_path, suffixed
from llmpipe.data.encoding import texts as data_texts
from llmpipe.data.readers import lines as lines_module
from llmpipe.data.tokenize import tokenize

KEYS, SEPARATOR = ["text", "title"], "\n\u00e9\n"
GOOD_NUMBERS = (
    "0", "-0", "7", "-12", "1234567890123456789", "0.5", "-0.0", "1e5", "1E+5", "2.5e-308", "1e999", "10.01",
)  # fmt: skip
BAD_NUMBERS = (
    "01", "-01", "+1", "1.", ".5", "1.e5", "1e", "1e+", "-", "-a", "0x1", "1_0", "1.2.3", "--1", "1e1.5", "\u0661",
)  # fmt: skip
VALUES = (
    "true", "false", "null", '""', "[]", "{}", "[ ]", "{ }", "[1,[2,{}]]", '{"text": "inner"}', "[" * 40 + "]" * 40,
)  # fmt: skip
BAD_VALUES = (
    "tru", "nul", "True", "None", "NaN", "Infinity", "-Infinity", "''", "[1,]", "[,1]", "[1", "2]", "{1:2}", '{"a":1,}',
    '{"a"}', '{"a":}', "[1}", "{]", "]", '"', "", "nullnull", "[" * 3000, "[" * 3000 + "]" * 3000, "7" * 5000,
    "\u00a01", "/**/1", "\x001", "\v1", r'"\x41"', r'"\u12"', r'"\u12g4"', r'"\u"', '"\\', r'"\U00000041"', r'"\"',
    '"a\tb"', '"\x1f"',
)  # fmt: skip
STRINGS = (
    r"\"\\\/\b\f\n\r\t", r"\u0041\u00e9\u00E9\u20ac\u0000", r"\ud83d\ude00\uD83D\uDE00", "\x7f\u0085\u2028", "",
    *("x" * n + end for n in (0, 1, 14, 15, 16, 17, 31, 33) for end in (r"\n", "\u4e2d", r"\\", "\U0001f600", "")),
)  # fmt: skip
HALVES = (
    r"\ud83d", r"\ude00", r"\ud83d\ud83d\ude00", r"\ud83dx\ude00", r"\ud83d\n", r"\ude00\ud83d", r"\ud83d\\ude00",
)  # fmt: skip
NO_UTF8 = (
    b"\xff", b"\xc3", b"\xc3\\n", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x9f\xbf", b"\x80",
    b"\xf0\x8f\xbf\xbf", b"\xe4\xb8", b"\xf0\x9f\x98", b"\xf5\x80\x80\x80", b"\xe4\xb8\xffa", b"a" * 15 + b"\xc3",
    b"\xc3" + b"a" * 20,
)  # fmt: skip
WHOLE = '{"text": "a\\u00e9", "title": "b", "n": 1.5e3}'


def line(**members: str) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in members.items()) + "}"


def plain() -> list[bytes]:
    """Lines that the compiled reader has to take."""
    found = [line(text=f'"{text}"', title='"t"') for text in STRINGS]
    found += [line(title=f'"{text}"', other=f'["{text}"]', text='"t"') for text in STRINGS]
    found += [line(text='"t"', n=value, title='""') for value in [*GOOD_NUMBERS, *VALUES]]
    found += [line(n=f"[{value} , {value}]", title='"t"', text='""') for value in [*GOOD_NUMBERS, *VALUES]]
    found += [line(text='"t"', n=f'{{"text": {value}}}', title='"x"') for value in VALUES]
    found += [line(a='"\\ud83d"', text='"t"', a2="1", title='"x"'), '{"a": 1, "a": 2, "text": "t", "title": "x"}']
    found += [line(textt="1", tex="2", te='"3"', text='"t"', title='"x"')]
    for text in texts(200):
        for ascii_only in (True, False):
            found.append(json.dumps({"id": 1, "text": text, "title": text[::-1]}, ensure_ascii=ascii_only))
    found += [f" \t{line(text=chr(34) + 'a' + chr(34), title=chr(34) * 2)} \t\r", '{ "title":"b" ,\t"text" : "a"\r}']
    return [text.encode() for text in found]


def odd() -> list[bytes]:
    """Lines that are for Python's json to judge."""
    found = [line(text='"t"', n=value, title='"t"') for value in [*BAD_NUMBERS, *BAD_VALUES]]
    found += [line(text=value, title='"t"') for value in [*GOOD_NUMBERS, *VALUES[:3], *VALUES[4:], *BAD_VALUES]]
    found += [line(title='"t"', text=f'"{half}"') for half in HALVES]
    found += ['{"text": "a"}', '{"title": "a"}', "{}", "[]", '"text"', "7", "null", "x", "{", "}", "{}}", "{,}", '"']
    found += ['{"text": "a", "title": "b", "text": "a"}', '{"text": "a", "text": "b"}', '{"title": "", "title": 1}']
    found += [r'{"\u0074ext": "a", "title": "b"}', r'{"text": "a", "\u0074ext": "b", "title": "c"}']
    found += ['{"text": "a", "title": "b"} x', '{"text": "a", "title": "b"},', '{"text": "a" "title": "b"}']
    found += ['{"text": "a", "title": "b",}', '{"text" "a"}', "{'text': 'a'}", '{text: "a"}', '\ufeff{"text": "a"}']
    found += [WHOLE + WHOLE, "\u00a0", "\u3000\u2028", "\x1c", "\v\f", "\0" * 9]
    found += [WHOLE[:cut] for cut in range(1, len(WHOLE))]
    in_text = [b'{"title": "", "text": "' + bad + b'"}' for bad in NO_UTF8]
    elsewhere = [b'{"title": "", "n": "' + bad + b'", "text": "a"}' for bad in NO_UTF8]
    return [*(text.encode() for text in found), *in_text, *elsewhere, b'{"title": "", "\xff": 1, "text": "a"}']


def mutated(count: int) -> list[bytes]:
    """Lines of both kinds with bytes changed, put in, taken out or moved about."""
    draw, sources = random.Random(3), [whole for whole in [*plain(), *odd()] if 0 < len(whole) < 500]
    marks, found = b'"\\{}[]:,u09eE+-. \t\r\x00\x1f\x7f\xc3\xa9\xed\xa0\xf0', []
    for _ in range(count):
        bytes_of = bytearray(draw.choice(sources))
        for _ in range(draw.randrange(1, 4)):
            at, kind = draw.randrange(len(bytes_of) + 1), draw.randrange(4)
            if kind == 0:
                bytes_of.insert(at, draw.choice(marks))
            elif kind == 1:
                bytes_of[at : at + 1] = bytes([draw.choice(marks)])
            elif kind == 2:
                del bytes_of[at : at + draw.randrange(1, 4)]
            else:
                bytes_of[at:at] = bytes_of[at - draw.randrange(1, 9) : at]
        found.append(bytes(bytes_of))
    return found


class Pairs(tuple):
    """An object as JSON has it."""


def truth(content: bytes, keys: list[str]) -> bytes | None:
    """The document of a line by Python's json; None without one."""
    try:
        row = json.loads(content.decode(), object_pairs_hook=Pairs)
        if not isinstance(row, Pairs):
            return None
        under = [[value for name, value in row if name == key] for key in keys]
        if any(len(values) != 1 or not isinstance(values[0], str) for values in under):
            return None
        return SEPARATOR.join(values[0] for values in under if values[0]).encode()
    except (ValueError, RecursionError):
        return None


def check(given: list[bytes], keys: list[str], ending: bytes) -> int:
    """What the reader takes is what Python's json finds, and all else is handed back; how many lines it took."""
    content = ending.join(given)
    content_lines = content.split(b"\n")
    alone = np.frombuffer(content, np.uint8).copy()  # a sanitizer sees its end
    text, offsets, left, count = helpers.json_texts(alone, keys, SEPARATOR)
    rows = [(number, row) for number, row in enumerate(content_lines) if row.strip(b" \t\r")]
    assert (len(offsets), count) == (len(rows) + 1, len(content_lines) - (not content_lines[-1]))
    by_text = {numbers[0]: numbers[1:] for numbers in left.reshape(-1, 4).tolist()}
    assert len(by_text) * 4 == len(left)
    for i, (number, row) in enumerate(rows):
        found, expected = text[offsets[i] : offsets[i + 1]].tobytes(), truth(row, keys)
        if i in by_text:
            where, start, stop = by_text[i]
            assert (found, where, content[start:stop].rstrip(b"\n")) == (b"", number, row.rstrip(b"\n"))
        else:
            assert found == expected, row
    return len(rows) - len(by_text)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n \t\n"], ids=["LF", "CRLF", "blank lines"])
def test_documents_are_those_of_pythons_json(ending: bytes) -> None:
    given = plain()
    assert check(given, KEYS, ending) == len(given)
    assert check([*given, b""], KEYS, ending) == len(given)
    assert check([row for row in given if b"textt" not in row], ["text"], ending) == len(given) - 1


def test_what_is_odd_is_handed_back() -> None:
    assert check(odd(), KEYS, b"\n") == 0
    for row in odd():
        assert check([row], KEYS, b"\n") == 0


@pytest.mark.parametrize("keys", [KEYS, KEYS[::-1], ["text"]], ids=["two", "turned", "one"])
def test_lines_with_anything_changed(keys: list[str]) -> None:
    given = mutated(8_000)
    assert 0.05 * len(given) < check(given, keys, b"\n") < 0.9 * len(given)


def test_bytes_around_the_lines_are_not_read() -> None:
    """A line cut anywhere: a sanitizer sees a byte too far."""
    whole = '{"title": "0123456789abcdef\\u00e9\u4e2d", "text": "é"}'.encode()
    for cut in range(len(whole) + 1):
        assert check([whole[:cut]], ["text"], b"\n") == (cut == len(whole))


def written(folder: Path, model: Path, keys: Any, skip_bad: int, source: Path) -> list[bytes]:
    """A corpus tokenized: its files."""
    prefix = folder / "c"
    tokenize(Corpus(files=[str(source)], text_key=keys, skip_bad=skip_bad), model, prefix, 1)
    facts = json.loads(suffixed(prefix, ".manifest.json").read_text())
    facts.pop("llmpipe")
    found = [suffixed(prefix, end).read_bytes() for end in (".bin", ".idx")]
    return [*found, json.dumps(facts).encode(), rejects_path(prefix).read_bytes() if skip_bad else b""]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("keys", "bad"), [("text", True), (KEYS, True), (KEYS, False)], ids=["one", "two", "clean"])
def test_datasets_are_the_same_by_python_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, keys: Any, bad: bool
) -> None:
    monkeypatch.setattr(lines_module, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(lines_module, "READ_BYTES", 5_000)
    rows = [*plain(), *(odd() if bad else []), *(mutated(300) if bad else [])]
    random.Random(4).shuffle(rows)
    source = tmp_path / f"c{suffix}"
    content = b"\n".join(row.replace(b"\n", b" ") for row in [plain()[0], *rows])
    source.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    model = train(tmp_path / "tokenizer.model", 400)
    own = written(tmp_path / "own", model, keys, bad * len(rows), source)
    monkeypatch.setattr(data_texts, "are_plain", lambda keys, separator: False)
    python = written(tmp_path / "python", model, keys, bad * len(rows), source)
    assert [len(part) for part in own] == [len(part) for part in python]
    assert own == python and len(own[0]) > 1000 and (b"is not JSON" in own[3]) is bad

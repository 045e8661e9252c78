"""Corpus files: what is found and read, and the text of every refusal."""

import gzip
import json
from pathlib import Path

import pytest

from llmpipe.data.sources import documents, find_files
from llmpipe.errors import UserError


def read(path: Path, key: str = "text") -> list[bytes]:
    return list(documents(path, key, lambda _: None))


def refusal(path: Path, data: bytes, key: str = "text") -> str:
    """The error of a file, without its folder."""
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    with pytest.raises(UserError) as error:
        read(path, key)
    return str(error.value).replace(f"{path.parent}/", "")


def test_find_files_sorts_a_directory_and_keeps_the_given_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("d/b.txt", "d/a.jsonl", "d/sub/0.jsonl.gz", "d/README.md", "d/.git/x.txt", "first.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([tmp_path / "first.txt", tmp_path / "d"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["first.txt", "d/a.jsonl", "d/b.txt", "d/sub/0.jsonl.gz"]
    assert "1 files of other kinds are left out, such as README.md" in caplog.text


def test_find_files_refuses(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    for path, message in [
        (tmp_path / "no.jsonl", "no.jsonl is missing: name a file or a directory of .jsonl, .jsonl.gz, .txt files"),
        (
            tmp_path / "a.parquet",
            "a.parquet is of a kind that llmpipe tokenize does not read: it reads .jsonl, .jsonl.gz, .txt",
        ),
        (tmp_path, "holds no .jsonl, .jsonl.gz, .txt file, though 1 other files"),
    ]:
        with pytest.raises(UserError) as error:
            find_files([path])
        assert message in str(error.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    texts = ["one", "", "line\u2028separator", "\U0001f600", 'quote " and \\ and \n']
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    data = ("\n".join([lines[0], "  ", *lines[1:]])).encode()  # a blank line, and no newline at the end
    path = tmp_path / f"c{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    counted: list[int] = []
    assert [text.decode() for text in documents(path, "text", counted.append)] == texts
    assert sum(counted) == path.stat().st_size


def test_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("two\nlines\n")
    assert read(tmp_path / "a.txt") == [b"two\nlines\n"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a}', 'is not JSON (Unterminated string starting at: character 10): \'{"text": "a}\''),
        (b"<html>", "is not JSON (Expecting value: character 1): '<html>'"),
        (b"[" * 100_000, "is not JSON ("),
        (b'["a"]', 'is a list, but each line has to be an object like {"text": "…"}'),
        (b'"a"', 'is a text, but each line has to be an object like {"text": "…"}'),
        (b"null", 'is null, but each line has to be an object like {"text": "…"}'),
        (b'{"id": 1, "txt": "a"}', "has no key 'text', its keys are 'id', 'txt'; did you mean 'txt'? (--text-key"),
        (b"{}", "has no key 'text', its keys are none (--text-key, or text_key in the corpus)"),
        (b'{"text": 12}', "'text' is a number, but has to be a text: '{\"text\": 12}'"),
        (b'{"text": null}', "'text' is null, but has to be a text"),
        (b'{"text": {"a": 1}}', "'text' is an object, but has to be a text"),
        (b'{"text": "ab\\ud83d"}', "the text has half of a surrogate pair, U+D83D at character 3; mend or leave out"),
        (b'{"text": "caf\xe9"}', 'is not UTF-8: byte 0xE9 after \'{"text": "caf\'; convert the file to UTF-8'),
    ],
)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_a_bad_line_is_named(tmp_path: Path, name: str, line: bytes, message: str) -> None:
    found = refusal(tmp_path / name, b'{"text": "good"}\n\n' + line + b"\n")
    assert found.startswith(f"{name}, line 3")
    assert message in found


def test_long_lines_are_cut_in_errors(tmp_path: Path) -> None:
    assert len(refusal(tmp_path / "c.jsonl", b"x" * 10_000)) < 200


def test_bad_utf8_in_a_text_file_is_named_by_line(tmp_path: Path) -> None:
    found = refusal(tmp_path / "a.txt", b"one\ntwo\nthr\xffee")
    assert found == "a.txt, line 3 is not UTF-8: byte 0xFF after 'one\\ntwo\\nthr'; convert the file to UTF-8"


def test_a_truncated_gz_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-10])
    with pytest.raises(UserError, match=r"c\.jsonl\.gz is truncated or no gzip file"):
        read(tmp_path / "c.jsonl.gz")
    (tmp_path / "d.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    with pytest.raises(UserError, match=r"d\.jsonl\.gz is truncated or no gzip file: Not a gzipped file"):
        read(tmp_path / "d.jsonl.gz")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    assert read(tmp_path / "a.jsonl") == [b"one", b"two"]
    assert read(tmp_path / "a.txt") == [b"one"]

"""Corpus files: what an input stands for, and the refusal of what it cannot."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from llmpipe.data.readers.block import whole
from llmpipe.data.sources import blocks, find_files, first_row
from llmpipe.errors import UserError

KINDS = ".jsonl, .json, .txt (also with .gz or .zst), .parquet and .arrow"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder: Path, *inputs: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_files([folder / name for name in inputs])]


def test_a_directory_is_sorted_and_the_given_order_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "d/b.txt", "d/a.jsonl", "d/sub/0.jsonl.gz", "d/README.md", "d/.git/x.txt", "first.txt")
    touch(tmp_path, "d/c.json.zst", "d/d.parquet", "d/e.arrow", "d/a/z.json")
    expected = ["first.txt", "d/a/z.json", "d/a.jsonl", "d/b.txt", "d/c.json.zst", "d/d.parquet", "d/e.arrow"]
    assert found(tmp_path, "first.txt", "d") == [*expected, "d/sub/0.jsonl.gz"]
    assert "1 files of other kinds are left out, such as README.md" in caplog.text


def test_refusals(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in [
        ("no.jsonl", f"no.jsonl is missing: name a file or a directory of {KINDS} files"),
        ("a.csv", f"a.csv is of a kind that llmpipe tokenize does not read: it reads {KINDS}"),
        ("pipe.jsonl", "pipe.jsonl is no regular file: write what comes out of it into one"),
        ("", f"holds no {KINDS} file, though 2 other files"),
    ]:
        with pytest.raises(UserError) as error:
            find_files([tmp_path / name])
        assert message in str(error.value)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    with pytest.raises(UserError, match=r"the name of '.*caf\\udce9\.jsonl' is not UTF-8: rename the file"):
        find_files([tmp_path])


def test_a_link_to_a_directory_is_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.txt", "d/b.txt")
    (tmp_path / "d/link").symlink_to(tmp_path / "real")
    assert found(tmp_path, "d") == ["d/b.txt", "d/link/a.txt"]
    (tmp_path / "real/up").symlink_to(tmp_path / "d")
    with pytest.raises(UserError, match="up is a link to a directory above it"):
        find_files([tmp_path / "d"])


def test_what_datasets_saves(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(10)]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one", num_shards=3)
    touch(tmp_path, "one/stray.arrow")
    shards = [f"one/data-0000{i}-of-00003.arrow" for i in range(3)]
    assert found(tmp_path, "one") == shards
    read = [row for name in shards for block in blocks(whole(tmp_path / name), ["text"]) for _, row in block.rows()]
    assert read == rows
    datasets.DatasetDict(train=one, test=one.select(range(2))).save_to_disk(tmp_path / "both")
    assert found(tmp_path, "both/test") == ["both/test/data-00000-of-00001.arrow"]
    with pytest.raises(
        UserError, match=r"both is a DatasetDict of 2 splits: name the one that is wanted, .*/train or "
    ):
        find_files([tmp_path / "both"])
    (tmp_path / "one/data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003\.arrow is missing, though .*state\.json lists it"):
        find_files([tmp_path / "one"])


@pytest.mark.parametrize("state", ["[]", "{}", '{"_data_files": [7]}'])
def test_another_state_json(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=r"state\.json is not what save_to_disk of `datasets` writes"):
        find_files([tmp_path])


def test_the_cache_of_the_hub(tmp_path: Path) -> None:
    touch(tmp_path, "d/blobs/0f", "d/blobs/1f", "d/refs/main", "d/snapshots/abc/README.md")
    data = tmp_path / "d/snapshots/abc/data"
    data.mkdir()
    for number in range(2):
        (data / f"train-0000{number}-of-00002.parquet").symlink_to(f"../../../blobs/{number}f")
    assert found(tmp_path, "d") == [f"d/snapshots/abc/data/train-0000{i}-of-00002.parquet" for i in range(2)]
    touch(data, "test-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"d holds the splits test, train: name the files that are wanted, as .*train-\*"
    ):
        find_files([tmp_path / "d"])
    touch(tmp_path, "d/snapshots/def/a.txt")
    with pytest.raises(UserError, match=r"d has 2 snapshots: name the one that is wanted, .*abc or .*def"):
        find_files([tmp_path / "d"])


def test_names_with_stars(tmp_path: Path) -> None:
    touch(tmp_path, "train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet")
    assert found(tmp_path, "train-*") == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    with pytest.raises(UserError, match=r"valid-\* fits no file: "):
        find_files([tmp_path / "valid-*"])
    touch(tmp_path, "a/x/1.txt", "b/x/1.txt", "b/2.txt")
    assert found(tmp_path, "*/x/*.txt") == ["a/x/1.txt", "b/x/1.txt"]
    assert found(tmp_path, "b*") == ["b/2.txt", "b/x/1.txt"]
    touch(tmp_path, "odd[1].txt")
    assert found(tmp_path, "odd[1].txt") == ["odd[1].txt"]


@pytest.mark.parametrize("write", [lambda path: path.write_text("a\nb"), lambda path: path.write_text("", "utf-8-sig")])
def test_a_text_file_is_one_document(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "a.txt")
    (block,) = blocks(whole(tmp_path / "a.txt"), ["text"])
    assert [row for _, row in block.rows()] == [(tmp_path / "a.txt").read_text("utf-8-sig")]


def test_bad_utf8_in_a_text_file_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee")
    (block,) = blocks(whole(tmp_path / "a.txt"), ["text"])
    ((number, bad),) = block.rows()
    assert f"{block.where(number)} {bad}" == (
        f"{tmp_path}/a.txt, line 3 is not UTF-8: byte 0xFF after 'one\\ntwo\\nthr'; convert the file to UTF-8"
    )


def test_the_first_row_is_the_first_good_one(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.jsonl").write_text("oops\n" + json.dumps({"a": 1}) + "\n")
    assert first_row([tmp_path / "empty.jsonl", tmp_path / "a.jsonl"], []) == {"a": 1}
    assert first_row([tmp_path / "empty.jsonl"], []) is None

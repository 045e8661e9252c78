"""A corpus in parts and in pieces: the bytes of the single run, what fits together, what a killed run leaves."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from test_tokenize import corpus, refused, run

from llmpipe.cli.merge import command as merge_command
from llmpipe.data.describe import describe
from llmpipe.data.parts import Part, cut
from llmpipe.data.readers.block import Span
from llmpipe.errors import UserError

SUFFIXES = (".bin", ".idx", ".roles.bin", ".roles.idx", ".rejects.jsonl")


def merge(*arguments: object) -> None:
    result = CliRunner().invoke(merge_command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def files(prefix: Path) -> dict[str, bytes]:
    """The bytes of a dataset, and its manifest without names."""
    found = {end: path.read_bytes() for end in SUFFIXES if (path := Path(f"{prefix}{end}")).is_file()}
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    manifest["files"] = [*manifest["files"].values()]
    return found | {"manifest": json.dumps(manifest).encode()}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A corpus of every format, with bad rows and empty documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"text number {i} " * (i % 17) for i in range(60)]
    corpus(folder / "a.jsonl", texts)
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace('{"text": "text number 9 ', "oops ", 1))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts[:9]] + [{"txt": 1}]))
    parquet.write_table(pyarrow.table({"text": texts}), folder / "d.parquet", row_group_size=9)
    (folder / "e.txt").write_text("one document\n")
    (folder / "empty.jsonl").touch()
    return folder


def test_cut_gives_every_byte_once() -> None:
    spans = [Span(Path(str(i)), 0, size, size) for i, size in enumerate((7, 0, 1, 100, 3))]
    for count in (1, 2, 3, 50, 200):
        parts = cut(spans, count)
        assert len(parts) == count
        for span in spans:
            of_file = [part for found in parts for part in found if part.path == span.path]
            assert [part.start for part in of_file] == [0, *(part.stop for part in of_file[:-1])]
            assert of_file[-1].stop == span.stop
    assert [sum(span.stop - span.start for span in part) for part in cut(spans, 2)] == [55, 56]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_merged_are_the_single_run(tmp_path: Path, tokenizer_dir: Path, mixed: Path, count: int) -> None:
    arguments = (mixed, "--tokenizer", tokenizer_dir, "--skip-bad", 3)
    run(*arguments, "--output", tmp_path / "single")
    for number in range(1, count + 1):
        run(*arguments, "--output", tmp_path / "c", "--part", f"{number}/{count}", "--workers", 1 + number % 2)
    parts = sorted(tmp_path.glob("c.part-*.idx"), reverse=True)
    merge(*(path.with_suffix("") for path in parts), "--output", tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "single")
    assert [*tmp_path.glob("c.part-*.rejects.jsonl")]
    merge(*(path.with_suffix("") for path in parts), "--output", tmp_path / "merged", "--remove-rejects")
    assert files(tmp_path / "merged") == files(tmp_path / "single")
    assert not [*tmp_path.glob("c.part-*.rejects.jsonl")]
    rejects = [json.loads(line) for line in (tmp_path / "single.rejects.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejects] == [
        (str(mixed / "a.jsonl"), 10), (str(mixed / "b.jsonl.gz"), 10), (str(mixed / "c.json"), 10)
    ]  # fmt: skip
    assert rejects[0]["reason"].startswith("is not JSON (Expecting value: character 1): 'oops text number 9 ")


def test_a_part_is_described(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", ["one two"] * 20)
    source.write_text(source.read_text() + "oops\n")
    arguments = (source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "c", "--skip-bad", 1)
    for number in (1, 2):
        run(*arguments, "--part", f"{number}/2")
    size, digest = source.stat().st_size, hashlib.sha256(source.read_bytes()).hexdigest()
    first, second = (describe(tmp_path / f"c.part-{number}-of-2").splitlines() for number in (1, 2))
    assert f"  source 1    {source}, {size:,} bytes, of which 0 to {size // 2:,}, SHA-256 {digest}" in first
    assert f"  source 1    {source}, {size:,} bytes, of which {size // 2:,} to {size:,}" in second
    assert "  part        2 of 2 of a corpus, which llmpipe merge makes of all" in second
    assert "  left out    0 documents without text" in first
    assert "  left out    0 documents without text, 1 bad rows" in second


def test_roles_are_merged_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = [{"input_ids": [i % 300] * (i % 5), "labels": [-100 if i % 2 else i % 300] * (i % 5)} for i in range(100)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (tmp_path / "c.jsonl", "--tokens", "--tokenizer", tokenizer_dir)
    run(*arguments, "--output", tmp_path / "single")
    for number in (1, 2, 3):
        run(*arguments, "--output", tmp_path / "c", "--part", f"{number}/3")
    merge(*tmp_path.glob("c.part-*.bin"), "--output", tmp_path / "merged")
    assert files(tmp_path / "merged") == files(tmp_path / "single")
    assert ".roles.bin" in files(tmp_path / "single")


def test_parts_that_do_not_fit(tmp_path: Path, tokenizer_dir: Path, other_tokenizer_dir: Path) -> None:
    source = corpus(tmp_path / "c.jsonl", [f"text {i}" for i in range(50)])

    def part(name: str, given: str, *options: object, tokenizer: Path = tokenizer_dir) -> Path:
        run(source, "--tokenizer", tokenizer, "--output", tmp_path / name, "--part", given, *options)
        return tmp_path / f"{name}.part-{given.replace('/', '-of-')}"

    def told(*parts: Path) -> str:
        with pytest.raises(UserError) as error:
            merge(*parts, "--output", tmp_path / "merged")
        assert not list(tmp_path.glob("merged*"))
        return str(error.value).replace(f"{tmp_path}/", "")

    first, third = part("c", "1/3"), part("c", "3/3")
    assert told(first, third) == "of the 3 parts of the corpus these are missing: 2"
    assert told(first, first) == "c.part-1-of-3 and c.part-1-of-3 are both part 1: name each part once"
    several = "are no parts of one corpus: other files, another tokenizer, other options or another number of parts"
    assert several in told(first, part("d", "2/2"))
    assert several in told(first, part("d", "2/3", "--bos"))
    assert several in told(first, part("d", "2/3", tokenizer=other_tokenizer_dir))
    source.write_text(source.read_text() + '{"text": "more"}\n')
    assert several in told(first, part("d", "2/3"))
    run(source, "--tokenizer", tokenizer_dir, "--output", tmp_path / "whole")
    assert told(first, tmp_path / "whole").startswith("whole is no part of a corpus, as others here are")


def test_bad_rows_of_all_parts_are_counted_together(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "c.jsonl").write_text('oops\n{"text": "a"}\n' * 20)
    arguments = (tmp_path / "c.jsonl", "--tokenizer", tokenizer_dir, "--output", tmp_path / "c", "--skip-bad", 15)
    parts = [tmp_path / f"c.part-{number}-of-2" for number in (1, 2)]
    for number in (1, 2):
        run(*arguments, "--part", f"{number}/2")
    with pytest.raises(UserError, match="the parts have 20 bad rows, and --skip-bad lets 15 pass"):
        merge(*parts, "--output", tmp_path / "merged")
    assert refused(*arguments) == (
        f"{tmp_path / 'c.jsonl'}, line 31 is not JSON (Expecting value: character 1): 'oops'; it is bad row 16 of the"
        " corpus, and --skip-bad lets 15 pass"
    )
    assert not list(tmp_path.glob("c.[bimr]*")), "only the parts are there"


@pytest.mark.parametrize("given", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2"])
def test_no_part(given: str) -> None:
    with pytest.raises(UserError, match=f"--part {given}: a part and how many there are is expected, from 1/16 to"):
        Part.parse(given)


SLOW = """
import sys, time
from llmpipe.data import pieces, stream
from llmpipe.cli import main
pieces.PIECE_BYTES = 20_000
write = stream.Stream.write
def slowly(*arguments, **more):
    time.sleep(0.2)
    return write(*arguments, **more)
stream.Stream.write = slowly
main()
"""


@pytest.fixture
def killed(tmp_path: Path, tokenizer_dir: Path) -> Iterator[tuple[list[str], Path, int]]:
    """A run of many pieces, killed after its third: its arguments, the folder of pieces, how many are finished."""
    source = corpus(tmp_path / "c.jsonl", [f"text number {i} " * 20 for i in range(700)])
    arguments = [str(source), "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", SLOW, "tokenize", *arguments], stderr=subprocess.DEVNULL)
    folder = tmp_path / ".out.pieces"
    while len(found := list(folder.glob("*/*.counts.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("out*"))
    yield arguments, folder, len(found)


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes pieces as small as those of the killed run, and notes which are written."""
    from llmpipe.data import pieces, stream

    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    names: list[str] = []
    write = stream.Stream.write

    def noted(self: Any, spans: Any, prefix: Path, *more: Any, **other: Any) -> Any:
        names.append(prefix.name)
        return write(self, spans, prefix, *more, **other)

    monkeypatch.setattr(stream.Stream, "write", noted)
    return names


def test_a_killed_run_goes_on_with_its_pieces(
    tmp_path: Path, killed: tuple[list[str], Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, folder, finished = killed
    run(*arguments[:-1], tmp_path / "undisturbed")
    names = written(monkeypatch)
    run(*arguments)
    assert names == [f"{number:05}" for number in range(finished + 1, 13)]
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert not folder.exists()


@pytest.mark.parametrize("change", ["corpus", "touched", "option", "tokenizer"])
def test_pieces_of_something_else_are_not_taken(
    killed: tuple[list[str], Path, int], monkeypatch: pytest.MonkeyPatch, change: str, other_tokenizer_dir: Path
) -> None:
    arguments, folder, _ = killed
    source = Path(arguments[0])
    if change == "corpus":  # in the middle, with the same length and time
        times = source.stat()
        source.write_text(source.read_text().replace("number 350", "nummer 350"))
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "touched":
        os.utime(source)
    elif change == "option":
        arguments.append("--bos")
    else:
        arguments[2] = str(other_tokenizer_dir)
    names = written(monkeypatch)
    run(*arguments)
    assert names == [f"{number:05}" for number in range(1, 13)]
    assert not folder.exists()


def test_one_run_at_a_time(killed: tuple[list[str], Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    arguments, folder, _ = killed
    written(monkeypatch)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert refused(*arguments).startswith(f"another llmpipe tokenize is writing {arguments[-1]}: wait for it, or name")
    os.close(descriptor)

"""Files and directories that appear whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmpipe import files
from llmpipe.files import HOST, aside, atomic_directory, atomic_file


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "made"
    path.write_text("older")
    with pytest.raises(KeyError), atomic_file(path, "w") as file:
        file.write("newer")
        raise KeyError
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]


def test_a_failed_directory_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "made"
    for text in ("older", "newer"):
        with atomic_directory(path) as part:
            (part / text).touch()
            assert not (path / text).exists()
    with pytest.raises(KeyError), atomic_directory(path) as part:
        (part / "newest").touch()
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["newer"] and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "made"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom llmpipe.files import atomic_directory\n"
        "with atomic_directory(Path(sys.argv[1])) as part:\n"
        "    (part / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".part")
    others = [tmp_path / ".made.by.hand.part", aside(tmp_path / "made2")]
    alive = tmp_path / f".made.{HOST}-1.part"  # process 1 lives
    for kept in (*others, alive):
        kept.mkdir()
    with atomic_directory(path) as part:
        (part / "whole").touch()
    assert {*tmp_path.iterdir()} == {path, alive, *others}


def test_writeback_begins_on_each_part_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, begin = [], files._sync_file_range

    def seen(descriptor: int, start: int, size: int, flags: int) -> int:
        begun.append((start, size, begin(descriptor, start, size, flags)))
        return begun[-1][2]

    monkeypatch.setattr(files, "_sync_file_range", seen)
    monkeypatch.setattr(files, "_WRITEBACK_BYTES", 8000)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        writeback = files.EarlyWriteback(file.fileno())
        for end in range(3000, 30001, 3000):
            file.write(bytes(3000))
            writeback.reached(end)
    assert begun == [(0, 9000, 0), (9000, 9000, 0), (18000, 9000, 0)]  # 0: the system took it


def test_writeback_that_the_system_refuses_is_left_to_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WRITEBACK_BYTES", 1)
    read, write = os.pipe()  # ESPIPE
    files.EarlyWriteback(write).reached(10)
    os.close(read)
    os.close(write)

"""Files and directories that appear whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

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

"""Runs that are cut short: a full disk, Ctrl-C, a worker that is killed, a file that changes; and what is left."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_tokenize import corpus, refused, run

from llmpipe.data.encoding.encoded import Encoded
from llmpipe.data.encoding.text_encoder import TextEncoder

WAITING = """
import threading, time
from pathlib import Path
from llmpipe.data.encoding import encoders
from llmpipe.data import pieces, tokenize
from llmpipe.data.readers import lines
from llmpipe.cli import main
lines.BLOCK_BYTES = tokenize.BLOCK_BYTES = 10_000
pieces.PIECE_BYTES = {piece_bytes}
encode = encoders.TextEncoder.encode
def slowly(self, *arguments):
    Path({folder!r}, str(threading.get_native_id())).touch()
    time.sleep(0.05)
    return encode(self, *arguments)
encoders.TextEncoder.encode = slowly
main()
"""


def source(tmp_path: Path) -> Path:
    return corpus(tmp_path / "c.jsonl", [f"text number {i} " * 20 for i in range(2000)])


def start(
    tmp_path: Path, tokenizer_dir: Path, piece_bytes: int, encoder: str = "reference"
) -> tuple[subprocess.Popen[str], Path]:
    """The command with two slow workers, as a shell starts it: in a group of its own; the workers' folder of names.

    Workers of llmpipe's own encoder are threads, those of the reference processes.
    """
    folder = tmp_path / "workers"
    folder.mkdir()
    code = WAITING.format(folder=str(folder), piece_bytes=piece_bytes)
    arguments = [str(source(tmp_path)), "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out" / "c")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "tokenize", *arguments, "--workers", "2", "--encoder", encoder],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    while len(list(folder.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    return process, folder


def alive(folder: Path) -> list[str]:
    """The workers that still run; a zombie does not."""
    states = {path.name: Path("/proc", path.name, "stat") for path in folder.iterdir()}
    return [name for name, stat in states.items() if stat.exists() and stat.read_text().split(") ")[1][0] != "Z"]


@pytest.mark.parametrize("encoder", ["auto", "reference"])
def test_ctrl_c_ends_all_and_leaves_nothing(tmp_path: Path, tokenizer_dir: Path, encoder: str) -> None:
    process, folder = start(tmp_path, tokenizer_dir, 1 << 30, encoder)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers as well
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.rstrip().endswith("Aborted!") and "Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []
    assert alive(folder) == []


@pytest.mark.parametrize("encoder", ["auto", "reference"])
def test_workers_end_with_a_killed_parent(tmp_path: Path, tokenizer_dir: Path, encoder: str) -> None:
    process, folder = start(tmp_path, tokenizer_dir, 1 << 30, encoder)
    process.kill()
    process.communicate()
    for _ in range(500):
        if not alive(folder):
            break
        time.sleep(0.01)
    assert alive(folder) == []
    assert list((tmp_path / "out").glob("[!.]*")) == []


def test_a_killed_worker_is_told(tmp_path: Path, tokenizer_dir: Path) -> None:
    """As the kernel does where memory runs out."""
    process, folder = start(tmp_path, tokenizer_dir, piece_bytes=1 << 30)
    os.kill(int(next(folder.iterdir()).name), signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "ERROR a worker was killed: if the machine's memory was full, run this again with fewer --workers" in said
    assert "Traceback" not in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("limit", [4_000, 150_000])
@pytest.mark.parametrize("piece_bytes", [1 << 30, 100_000])
def test_a_full_disk(tmp_path: Path, tokenizer_dir: Path, limit: int, piece_bytes: int) -> None:
    """A limit on files stands in for it: nothing that is finished is there, and with room the bytes are the same."""
    arguments = [str(source(tmp_path)), "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out" / "c")]
    code = f"from llmpipe.data import pieces; pieces.PIECE_BYTES = {piece_bytes}; from llmpipe.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "tokenize", *arguments], stderr=subprocess.PIPE, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "ERROR File too large" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list((tmp_path / "out").glob("[!.]*")) == []
    subprocess.run([sys.executable, "-c", code, "tokenize", *arguments], stderr=subprocess.DEVNULL, check=True)
    run(*arguments[:-1], tmp_path / "undisturbed")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out/c{suffix}").read_bytes() == (tmp_path / f"undisturbed{suffix}").read_bytes()
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_a_file_that_changes_is_told(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = source(tmp_path)
    encode = TextEncoder.encode

    def appending(self: TextEncoder, *arguments: Any) -> Encoded:
        with path.open("a") as file:
            file.write(json.dumps({"text": "more"}) + "\n")
        return encode(self, *arguments)

    monkeypatch.setattr(TextEncoder, "encode", appending)
    message = refused(path, "--tokenizer", tokenizer_dir, "--output", tmp_path / "out", "--workers", 1)
    assert message == f"{path}: a file was changed while it was read; run this again"
    assert not list(tmp_path.glob("out*"))

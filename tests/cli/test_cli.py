"""The command group: what it lists, that it starts at once, how it tells mistakes."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmpipe.cli import COMMANDS, group, main

HEAVY = ("torch", "transformers", "mlflow", "sentencepiece", "datasets", "lm_eval", "snakemake", "numpy",
         "huggingface_hub")  # fmt: skip


def llmpipe(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmpipe", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_stages_are_listed_in_the_order_of_the_flow() -> None:
    shown = CliRunner().invoke(group, ["--help"]).output
    listed = [line.split()[0] for line in shown.split("Commands:")[1].splitlines() if line.strip()]
    assert listed == [
        "download", "tokenize", "convert", "verify", "shard", "merge", "finetune", "evaluate", "export", "inspect",
        "diff", "track", "report", "doctor",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_an_example(name: str) -> None:
    shown = CliRunner().invoke(group, [name, "--help"]).output
    assert f"llmpipe {name} " in shown.split("Example:")[1]
    assert "--log FILE" in shown


def test_a_command_that_ends_looks_for_no_garbage() -> None:
    code = """
import gc, sys
from llmpipe.cli import main
class Garbage:
    def __init__(self): self.itself = self
    def __del__(self): print("found")
gc.disable()
Garbage()
sys.argv = ["llmpipe", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("llmpipe") and "found" not in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from llmpipe.cli import COMMANDS, group\n"
        "for name in COMMANDS:\n"
        "    try: group.main([name, '--help'], standalone_mode=True)\n"
        "    except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_mistake_is_one_sentence_on_stderr_and_in_the_log(tmp_path: Path) -> None:
    done = llmpipe("convert", "missing", "--output", "out", "--log", "logs/convert.log", cwd=tmp_path)
    assert done.returncode == 1
    assert "ERROR missing" in done.stderr and "Traceback" not in done.stderr
    log = (tmp_path / "logs/convert.log").read_text()
    assert "$ llmpipe convert missing --output out --log logs/convert.log" in log and "ERROR missing" in log


def test_an_error_is_the_last_line(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever of the compiled helpers the error's frames still hold."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    (source := tmp_path / "source").mkdir()
    shutil.copy(checkpoint / "config.json", source)
    save_file(tensors, source / "model.safetensors")
    done = llmpipe("convert", str(source), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "ERROR" in (last := done.stderr.splitlines()[-1]) and "NaN or infinite values" in last


def test_an_unknown_command_names_the_nearest() -> None:
    assert "there is no command 'tokenise': did you mean 'tokenize'?" in llmpipe("tokenise").stderr


def test_a_place_that_cannot_be_written_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = llmpipe("inspect", "nothing", "--log", "file/log", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "ERROR File exists: file: name another place\n"


def test_a_full_disk_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(group, "main", full)
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda _: False)
    with pytest.raises(SystemExit, match="1"):
        main()
    told = "ERROR No space left on device: make room, then run this again; nothing half-written has taken its name\n"
    assert capsys.readouterr().err == told

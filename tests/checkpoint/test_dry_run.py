"""--dry-run tells what the real run would refuse, and writes nothing; it lists the files that would be written."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_twins import theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import Target, convert, plan_convert, shard
from llmpipe.cli.convert import command as convert_command
from llmpipe.cli.shard import command as shard_command
from llmpipe.errors import UserError
from llmpipe.layout import Stages

WORDS = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {f"w{number}": number for number in range(600)}, "unk_token": "w0"},
}  # fmt: skip


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(content)


def sizes(path: Path) -> None:
    """A finished checkpoint, one of whose files was changed."""
    manifest.write(path, "checkpoint", {})
    (path / "config.json").write_text((path / "config.json").read_text() + " ")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tokenizer of another model": (write("tokenizer.json", json.dumps(WORDS)), "has 600 tokens, but the embedding"),
    "no tokenizer at all": (write("tokenizer.json", "[]"), "is not a tokenizer of the tokenizers library"),
    "no SentencePiece model": (write("tokenizer.model", "hello"), "is neither a SentencePiece model nor"),
    "not fetched": (write("tokenizer_config.json", "version https://git-lfs.github.com/spec/v1"), "pointer of git-lfs"),
    "another manifest": (sizes, "bytes, but manifest.json says"),
    "a damaged manifest": (write("manifest.json", ""), "manifest.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_contradictions_are_told_by_both(hf: Path, tmp_path: Path, name: str) -> None:
    change, told = CHANGES[name]
    change(hf)
    for options in ((), ("--dry-run",)):
        result = CliRunner().invoke(convert_command, [str(hf), "--output", str(tmp_path / "out"), *options])
        assert isinstance(result.exception, UserError) and told in str(result.exception), (options, result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shard_wants_a_finished_checkpoint_in_both(hf: Path, tmp_path: Path) -> None:
    for options in ((), ("--dry-run",)):
        result = CliRunner().invoke(shard_command, [str(hf), "--output", str(tmp_path / "out"), *options])
        assert isinstance(result.exception, UserError) and "has no manifest.json" in str(result.exception)
    (hf / "manifest.json").write_text('{"name": "an app", "version": 3}')  # another tool's
    convert(hf, tmp_path / "out")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        shard(hf, tmp_path / "ranks", 1, Stages(1))


@pytest.mark.parametrize("name", ["falcon 7b", "llama, biases", "llama, linear", "qwen3", "mistral, window"])
def test_formats_that_cannot_hold_a_model_are_told_by_both(tmp_path: Path, name: str) -> None:
    theirs(name).save_pretrained(tmp_path / "hf")
    for target in (Target("meta"), Target("easylm"), Target("megatron", "ali")):
        messages = []
        for run in (plan_convert, convert):
            with pytest.raises(UserError) as error:
                run(tmp_path / "hf", tmp_path / "out", target)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("to", ["hf", "meta", "megatron", "easylm"])
def test_the_files_that_are_listed_are_those_that_are_written(
    meta: Path, tokenizer_model: Path, tmp_path: Path, to: str
) -> None:
    shutil.copy(tokenizer_model, tmp_path / "tokenizer.model")  # one folder above
    target = Target(to)  # pyright: ignore[reportArgumentType]
    lines = plan_convert(meta, tmp_path / "out", target)
    beside = next(match for line in lines if (match := re.search(r"would write \S+: (.*), and weights of", line)))
    weights = {Path(line.split(", ")[0]).relative_to(tmp_path / "out") for line in lines if re.match(r"\S+/out/", line)}
    convert(meta, tmp_path / "out", target)
    written = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if to == "megatron":
        weights.add(Path("latest_checkpointed_iteration.txt"))
    assert {*map(Path, beside[1].split(", "))} | weights == written

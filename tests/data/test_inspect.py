"""llmpipe inspect: what it says of datasets, checkpoints and everything else."""

import struct
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from data_help import dataset, facts
from transformers import AutoModelForCausalLM

from llmpipe.checkpoint import manifest as directory_manifest
from llmpipe.cli.inspect import command
from llmpipe.cli.tokenize import command as tokenize
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Writer
from llmpipe.data.describe import histogram
from llmpipe.errors import UserError


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        shown(*arguments)
    return str(error.value)


def test_histogram_has_a_row_per_power_of_two() -> None:
    assert [line.split() for line in histogram(np.array([0, 1, 1, 2, 3, 3, 3, 8, 15]))] == [
        ["0", "to", "0", "1", "#" * 10],
        ["1", "to", "1", "2", "#" * 20],
        ["2", "to", "3", "4", "#" * 40],
        ["4", "to", "7", "0"],
        ["8", "to", "15", "2", "#" * 20],
    ]


def test_a_dataset_with_a_manifest(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [3, 40])
    source = {"path": "c.jsonl", "bytes": 12345, "sha256": "cc"}
    manifest.write(tmp_path / "d", facts(empty_documents=2) | {"sources": [source]})
    text = shown(tmp_path / "d")
    for line in (
        f"dataset {tmp_path}/d",
        "  documents   2",
        "  tokens      43",
        "  stored as   int32, 172 bytes",
        "  left out    2 documents without text",
        "  tokenizer   aa/tokenizer.model, 300 tokens, SHA-256 aa",
        "  BOS         before each document",
        "  EOD         after each document",
        "  source 1    c.jsonl, 12,345 bytes, SHA-256 cc",
    ):
        assert line in text.splitlines()
    assert shown(tmp_path / "d.bin") == shown(tmp_path / "d.idx") == text


def test_a_dataset_of_megatrons_and_an_empty_one(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [3])
    assert "manifest    none: not made by llmpipe, so its tokenizer is not known" in shown(tmp_path / "d")
    (tmp_path / "none.bin").touch()
    (tmp_path / "none.idx").write_bytes(struct.pack("<9sQBQQq", b"MMIDIDX\0\0", 1, 8, 0, 1, 0))
    assert "documents   0" in shown(tmp_path / "none")


def test_documents_whose_tokenizer_is_not_there_are_numbers(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [3, 0, 400])
    manifest.write(tmp_path / "d", facts() | {"sources": []})
    text = shown(tmp_path / "d")
    assert "--tokenizer names it" in text
    assert "document 0, 3 tokens\n0 1 2\n\ndocument 1, 0 tokens\n\n\ndocument 2, 400 tokens\n3 4 5 " in text
    assert text.endswith("…\n")


def test_sequences_and_empty_documents_are_counted(tmp_path: Path) -> None:
    with Writer(tmp_path / "d", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(6), np.array([2, 4]), np.array([2, 2]))
    assert "  documents   2 (2 sequences" not in shown(tmp_path / "d")
    assert "  documents   2 (1 without tokens)" in shown(tmp_path / "d")
    with Writer(tmp_path / "e", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(6), np.array([2, 4]), np.array([2]))
    assert "  documents   1 (2 sequences)" in shown(tmp_path / "e")


def test_first_documents_are_the_texts(tmp_path: Path, tokenizer_dir: Path, other_tokenizer_dir: Path) -> None:
    texts = ["two\nlines", "b" * 1000, "third"]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    arguments = [tmp_path / "in", "--tokenizer", tokenizer_dir, "--output", tmp_path / "d", "--bos"]
    CliRunner().invoke(tokenize, [str(argument) for argument in arguments], catch_exceptions=False)
    text = shown(tmp_path / "d", "--tokenizer", tokenizer_dir, "--documents", 2)
    assert f"two\nlines\n\ndocument 1, 1,002 tokens\n{'b' * 300}…\n" in text
    assert "third" not in text
    assert shown(tmp_path / "d", "--documents", 2) == text  # the manifest says where it lies
    message = refused(tmp_path / "d", "--tokenizer", other_tokenizer_dir)
    assert "is a dataset tokenized by another tokenizer than the model's" in message


def test_a_checkpoint(checkpoint: Path) -> None:
    text = shown(checkpoint)
    parameters = AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    for line in (
        f"checkpoint {checkpoint}",
        f"  digest        {directory_manifest.read(checkpoint).digest}",
        f"  model         llama, {parameters:,} parameters in 39 tensors",
        "  layers        4, 32 wide, MLP 48, 4 heads of 8, 2 KV heads",
        "  vocabulary    203 tokens, separate output head",
    ):
        assert line in text.splitlines()
    assert all(path.name in text for path in checkpoint.iterdir() if path.name != "manifest.json")


def test_weights_without_a_model_and_their_source(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1234567")
    directory_manifest.write(tmp_path, "training_checkpoint", {"path": "x", "step": 5})
    text = shown(tmp_path)
    assert text.startswith(f"training_checkpoint {tmp_path}\n")
    assert "  source path   x\n  source step   5\n" in text
    assert "files, 7 bytes\n" in text


def test_anything_else_is_refused_and_what_is_inside_named(tmp_path: Path) -> None:
    what = "the prefix of a dataset, a run's folder, weights, an adapter, or a directory with a manifest.json"
    message = f"{tmp_path} is not {what}"
    assert refused(tmp_path) == message
    dataset(tmp_path / "d", [3])
    (tmp_path / "weights").mkdir()
    directory_manifest.write(tmp_path / "weights", "weights", {})
    assert refused(tmp_path) == f"{message}; inside it there are {tmp_path}/weights, {tmp_path}/d"

"""Megatron's own files and indices (docs/proof/megatron_data.json) beside ours, from the same tiny datasets."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from llmpipe.cli.tokenize import command as tokenize
from llmpipe.data.batches.sampling import Blend
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader, Writer, token_dtype

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks/proof"))

import tiny_data  # noqa: E402
from fuzz import Files, mmap_files, old_files  # noqa: E402

RECORD = json.loads((ROOT / "docs/proof/megatron_data.json").read_text())


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tiny dataset, written by llmpipe."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, (_, _, _, vocab, _) in tiny_data.DATASETS.items():
        with Writer(folder / name, token_dtype(vocab)) as writer:
            for document in tiny_data.documents(name):
                sizes = np.array([len(sequence) for sequence in document])
                writer.add(np.concatenate(document), sizes, np.array([len(document)]))
    return folder


def digests(prefix: Path) -> dict[str, str]:
    paths = {"bin": manifest.bin_path(prefix), "idx": manifest.idx_path(prefix)}
    return {end: hashlib.sha256(path.read_bytes()).hexdigest() for end, path in paths.items()}


@pytest.mark.parametrize("name", RECORD["files"])
def test_our_files_are_megatrons_byte_for_byte(name: str, datasets: Path) -> None:
    assert digests(datasets / name) == RECORD["files"][name]


def digest(arrays: list[np.ndarray], dtype: str) -> str:
    return hashlib.sha256(b"".join(array.astype(dtype).tobytes() for array in arrays)).hexdigest()


def drawn(blend: Blend) -> dict[str, str]:
    """The digests of a blend's arrays, as the record lists Megatron's."""
    types = {"document_index": "<i4", "sample_index": "<i8", "shuffle_index": "<u4"}
    found = {name: digest([getattr(one, name) for one in blend.datasets], dtype) for name, dtype in types.items()}
    if len(blend.datasets) > 1:
        found["dataset_index"] = digest([blend.dataset_index], "<i2")
        found["dataset_sample_index"] = digest([blend.dataset_sample_index], "<i8")
    return found


@pytest.mark.parametrize("name", tiny_data.SAMPLINGS)
def test_our_indices_are_megatrons(name: str, datasets: Path) -> None:
    case, found = tiny_data.SAMPLINGS[name], {}
    for part, wanted in zip(tiny_data.PARTS, case["num_samples"], strict=True):
        if wanted == 0:
            continue
        if case["split"]:
            data, split, where = case["data"], [float(share) for share in f"{case['split']},0".split(",")][:3], part
        else:
            data, split, where = case["data"][part], [1, 0, 0], "train"
        prefixes = {datasets / one: weight for one, weight in data.items()}
        found[part] = drawn(Blend(prefixes, split, where, case["seq_len"], wanted, case["seed"]))
    assert found == RECORD["samplings"][name]


def test_the_record_has_what_it_promises() -> None:
    assert len(RECORD["samplings"]) >= 12
    assert RECORD["ours"]["sequences"] == sum(
        len(document) for name in tiny_data.DATASETS for document in tiny_data.documents(name)
    )
    assert RECORD["ours"]["samples"] == sum(sum(case["num_samples"]) for case in tiny_data.SAMPLINGS.values())


def sequences_of(name: str) -> list[np.ndarray]:
    return [sequence for document in tiny_data.documents(name) for sequence in document]


def other_files(name: str, sequences: list[np.ndarray]) -> Files:
    """One of Megatron-LLM's files that we do not write, made by struct alone."""
    sizes, text = [len(sequence) for sequence in sequences], np.concatenate(sequences)
    ends = list(range(len(sizes) + 1))
    return {
        "old int32": lambda: old_files(4, "<i4", 4, sizes, ends, text),
        "old int64": lambda: old_files(5, "<i8", 8, sizes, ends, text),
        "old float": lambda: old_files(6, "<f8", 4, sizes, ends, text),
        "old double": lambda: old_files(7, "<f8", 8, sizes, ends, text),
        "instruction mmap": lambda: mmap_files(8, "<u2", sizes, [0], text),
        "instruction lazy": lambda: old_files(4, "<i4", 4, sizes, [0], text),
    }[name]()


@pytest.mark.parametrize("name", RECORD["other_files"])
def test_older_and_instruction_files_are_read(name: str, tmp_path: Path) -> None:
    """The digests show that what the test makes is what Megatron-LLM writes."""
    sequences = sequences_of("uneven" if name.startswith("instruction") else "wide")
    for end, data in other_files(name, sequences).items():
        (tmp_path / f"d.{end}").write_bytes(data)
    assert digests(tmp_path / "d") == RECORD["other_files"][name]
    reader = Reader(tmp_path / "d")
    assert reader.num_documents == len(sequences)
    for number, sequence in enumerate(sequences):
        np.testing.assert_array_equal(reader.read(number), sequence)


def test_a_corpus_tokenized_is_that_of_preprocess_data(tmp_path: Path) -> None:
    model, texts = (
        tiny_data.tokenizer_model(tmp_path / "tokenizer.model"),
        tiny_data.text_file(tmp_path / "texts.jsonl"),
    )
    assert hashlib.sha256(model.read_bytes()).hexdigest() == RECORD["corpus"]["tokenizer"]
    arguments = [str(texts), "--tokenizer", str(model), "--output", str(tmp_path / "corpus"), "--append-eod"]
    CliRunner().invoke(tokenize, arguments, catch_exceptions=False)
    assert digests(tmp_path / "corpus") == {end: RECORD["corpus"][end] for end in ("bin", "idx")}

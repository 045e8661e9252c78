"""Rows that are tokens already: their bytes by hand, their roles, and the refusal of rows that do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from test_tokenize import refused, run

ROWS = [
    {"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]},
    {"input_ids": [], "labels": []},
    {"input_ids": [399], "labels": [399], "attention_mask": [1]},
    {"input_ids": [0, 0, 8, 9, 0], "labels": [-100, -100, -100, 9, -100], "attention_mask": [0, 0, 1, 1, 0]},
]
TOKENS = [[1, 5, 6, 7], [399], [8, 9]]
ROLES = [[1, 1, 2, 2], [2], [1, 2]]


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        keys = dict.fromkeys(key for row in rows for key in row)
        parquet.write_table(pyarrow.table({key: [row.get(key) for row in rows] for key in keys}), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenize(source: Path, tokenizer_dir: Path) -> tuple[Any, ...]:
    return source, "--tokens", "--tokenizer", tokenizer_dir, "--output", source.with_name("out")


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_ids_and_roles_are_the_rows(tmp_path: Path, tokenizer_dir: Path, name: str) -> None:
    (tmp_path / "out.rejects.jsonl").touch()  # of an older run
    log = run(*tokenize(write(tmp_path / name, ROWS), tokenizer_dir))
    assert (tmp_path / "out.bin").read_bytes() == np.concatenate(TOKENS).astype("<u2").tobytes()
    assert (tmp_path / "out.roles.bin").read_bytes() == bytes(np.concatenate(ROLES).tolist())
    for suffix in (".idx", ".roles.idx"):
        assert np.fromfile(tmp_path / f"out{suffix}", "<i4", 3, offset=34).tolist() == [4, 1, 2]
    facts = json.loads((tmp_path / "out.manifest.json").read_text())
    assert (facts["corpus_kind"], facts["bos"], facts["append_eod"]) == ("tokens", False, False)
    assert (facts["documents"], facts["empty_documents"], facts["tokens"]) == (3, 1, 7)
    assert list(facts["files"]) == ["out.bin", "out.idx", "out.roles.bin", "out.roles.idx"]
    assert "1 documents have no text and are left out" in log
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_without_labels_there_are_no_roles(tmp_path: Path, tokenizer_dir: Path) -> None:
    run(*tokenize(write(tmp_path / "c.jsonl", ROWS), tokenizer_dir))
    bare = [{"input_ids": row["input_ids"], "labels": None} for row in ROWS[:3]]
    run(*tokenize(write(tmp_path / "c.jsonl", bare), tokenizer_dir))
    assert (tmp_path / "out.bin").read_bytes() == np.concatenate(TOKENS[:2]).astype("<u2").tobytes()
    assert not list(tmp_path.glob("out.roles*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 400], "labels": [1, 400]}, "has the token 400 in 'input_ids'[1], but the tokenizer has 400"),
        ({"input_ids": [-1], "labels": [-1]}, "has the token -1 in 'input_ids'[0], but the tokenizer has 400 tokens"),
        ({"input_ids": [2**64], "labels": [1]}, "has something else than whole numbers in 'input_ids'"),
        ({"input_ids": [1.5], "labels": [1]}, "has something else than whole numbers in 'input_ids'"),
        ({"input_ids": ["1"], "labels": [1]}, "has something else than whole numbers in 'input_ids'"),
        ({"input_ids": [[1]], "labels": [1]}, "has something else than whole numbers in 'input_ids'"),
        ({"input_ids": [[1], 2], "labels": [1]}, "has something else than whole numbers in 'input_ids'"),
        ({"input_ids": "1 2", "labels": [1]}, "has a text under 'input_ids', but it has to be a list of whole numbers"),
        ({"ids": [1]}, "has no key 'input_ids', its keys are 'ids'; did you mean 'ids'?"),
        ([1, 2], "is a list, but each row has to be an object like"),
        ({"input_ids": [1, 2], "labels": [2]}, "has 2 input_ids and 1 labels: there has to be one of each for a token"),
        (
            {"input_ids": [1, 2], "labels": [2, -100]},
            "has the label 2 in 'labels'[0], but the token there is 1: a label is its own token, or -100",
        ),
        ({"input_ids": [1, 2]}, "has no labels, but the corpus's first row has them"),
        (
            {"input_ids": [1], "labels": [1], "attention_mask": [1, 1]},
            "has 1 input_ids and 2 numbers in 'attention_mas",
        ),
        ({"input_ids": [1], "labels": [1], "attention_mask": [2]}, "has 2 in 'attention_mask', which holds 0 for padd"),
        (
            {"input_ids": [1], "labels": [1], "attention_mask": [0]},
            "has the label 1 in 'labels'[0], which 'attention_mask' says is padding",
        ),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, tokenizer_dir: Path, row: Any, message: str) -> None:
    source = write(tmp_path / "c.jsonl", [ROWS[0], row])
    assert refused(*tokenize(source, tokenizer_dir)).startswith(f"{source}, line 2 {message}")
    assert list(tmp_path.iterdir()) == [source]


def test_labels_that_come_late(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write(tmp_path / "c.jsonl", [{"input_ids": [1]}, ROWS[0]])
    assert refused(*tokenize(source, tokenizer_dir)).endswith("line 2 has labels, but the corpus's first row has none")


@pytest.mark.parametrize(("labels", "row"), [("true", ROWS[0] | {"labels": None}), ("false", ROWS[0])])
def test_labels_are_as_the_corpus_file_says(tmp_path: Path, tokenizer_dir: Path, labels: str, row: Any) -> None:
    source = write(tmp_path / "c.jsonl", [row])
    (tmp_path / "c.yaml").write_text(f"files: [{source}]\nkind: tokens\nlabels: {labels}\n")
    told = refused(tmp_path / "c.yaml", "--tokenizer", tokenizer_dir, "--output", tmp_path / "out")
    assert f"but the corpus says labels: {labels}: mend" in told


def test_bos_does_not_go_with_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = write(tmp_path / "c.jsonl", ROWS)
    found = refused(*tokenize(source, tokenizer_dir), "--bos")
    assert found == "bos: true does not go with kind: tokens, which are taken as they are"

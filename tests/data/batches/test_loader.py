"""Batches against hand-made documents; the same global batch for any split of it; the checks against a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_help import dataset, facts

from llmpipe.data.batches.fit import check_tokenizer, check_vocab
from llmpipe.data.batches.held_out import heldout
from llmpipe.data.batches.loader import Loader
from llmpipe.data.batches.sampling import Blend
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Writer
from llmpipe.errors import UserError
from llmpipe.files import sha256

ALL = [1.0, 0.0, 0.0]


class Rows:
    """A blend of given rows."""

    def __init__(self, *rows: tuple[list[int], list[int]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> list[tuple[np.ndarray, list[int]]]:
        return [(np.array(self.rows[index][0]), self.rows[index][1]) for index in indices]


# seq_len 4; a document starts at 2, none, at the last label (4), at 1 and 3
ROWS = Rows(([1, 2, 3, 4, 5], [2]), ([6, 7, 8, 9, 10], []), ([11, 12, 13, 14, 15], [4]), ([16, 17, 18, 19, 20], [1, 3]))


def test_a_batch_by_hand() -> None:
    batch = Loader(ROWS, 4, 4, 2, 1, 0).step(0)  # type: ignore[arg-type]
    assert batch.tokens.tolist() == [[[1, 2, 3, 4], [6, 7, 8, 9]], [[11, 12, 13, 14], [16, 17, 18, 19]]]
    assert batch.labels.tolist() == [[[2, 3, 4, 5], [7, 8, 9, 10]], [[12, 13, 14, 15], [17, 18, 19, 20]]]
    assert batch.weights.tolist() == [[[1, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 1, 0], [0, 1, 0, 1]]]
    assert batch.cu_seqlens.tolist() == [[0, 2, 4, 8, 8], [0, 4, 5, 7, 8]]
    types = [batch.tokens.dtype, batch.labels.dtype, batch.weights.dtype, batch.cu_seqlens.dtype]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int32]


def test_crossing_documents_keeps_rows_apart_only() -> None:
    batch = Loader(ROWS, 4, 4, 2, 1, 0, isolate_documents=False).step(0)  # type: ignore[arg-type]
    assert batch.weights.tolist() == torch.ones(2, 2, 4).tolist()
    assert batch.cu_seqlens.tolist() == [[0, 4, 8], [0, 4, 8]]


def test_a_step_reads_all_its_rows_in_one_call() -> None:
    asked = []

    class Noted(Rows):
        def read(self, indices: np.ndarray) -> list[tuple[np.ndarray, list[int]]]:
            asked.append(indices.tolist())
            return super().read(indices)

    Loader(Noted(*ROWS.rows), 4, 4, 1, 2, 1).step(0)  # type: ignore[arg-type]
    assert asked == [[2, 3]]


def test_any_split_gives_the_same_global_batch(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [3, 14, 7, 1, 9, 20, 2] * 5)
    blend = Blend({tmp_path / "d": 1.0}, ALL, "train", 6, 36, 5)

    def rows(dp: int, micro_batch: int, step: int) -> list:
        batches = [Loader(blend, 6, 12, micro_batch, dp, rank).step(step) for rank in range(dp)]
        assert {tuple(batch.tokens.shape) for batch in batches} == {(12 // dp // micro_batch, micro_batch, 6)}
        return [
            torch.cat([getattr(b, name).flatten(0, 1) for b in batches]).tolist()
            for name in ("tokens", "labels", "weights")
        ]

    for step in range(3):
        expected = rows(1, 1, step)
        assert expected[0] == [blend[i][0][:-1].tolist() for i in range(12 * step, 12 * step + 12)]
        for dp, micro_batch in ((1, 4), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)):
            assert rows(dp, micro_batch, step) == expected


def test_weights_and_cu_seqlens_follow_the_documents(tmp_path: Path) -> None:
    """All tokens differ and documents are runs of neighbours: a border is where a label does not follow its token."""
    dataset(tmp_path / "d", [3, 14, 7, 1, 9, 20, 2] * 5)
    blend = Blend({tmp_path / "d": 1.0}, ALL, "train", 6, 200, 5)
    loader = Loader(blend, 6, 8, 4, 1, 0)
    first_tokens = {0, *np.cumsum([3, 14, 7, 1, 9, 20, 2] * 5).tolist()}
    for step in range(25):
        batch = loader.step(step)
        torch.testing.assert_close(batch.weights == 0, torch.isin(batch.labels, torch.tensor(sorted(first_tokens))))
        for tokens, cu_seqlens in zip(batch.tokens.flatten(1), batch.cu_seqlens, strict=True):
            borders = {0, 6, 12, 18, 24} | {i for i, token in enumerate(tokens.tolist()) if token in first_tokens}
            assert cu_seqlens.tolist() == sorted(borders) + [24] * (len(cu_seqlens) - len(borders))


def test_an_indivisible_batch_is_refused() -> None:
    with pytest.raises(UserError) as error:
        Loader(ROWS, 4, 4, 3, 2, 0)  # type: ignore[arg-type]
    assert str(error.value) == (
        "global_batch 4 is not divisible by dp 2 x micro_batch 3 = 6: change global_batch in the recipe, to 6 say,"
        " or dp or micro_batch in the layout"
    )


def test_heldout_predicts_each_token_once(tmp_path: Path) -> None:
    documents = dataset(tmp_path / "d", [4, 1, 0, 8, 9, 10, 2])
    pieces = [piece.tolist() for piece in heldout(tmp_path / "d", [1, 3, 3], "test", 4)]
    assert pieces == [
        [13, 14, 15, 16, 17],
        [17, 18, 19, 20, 21],
        [22, 23, 24, 25, 26],
        [26, 27, 28, 29, 30],
        [30, 31],
        [32, 33],
    ]
    predicted = [token for piece in pieces for token in piece[1:]]
    assert predicted == [token for document in documents[4:] for token in document[1:].tolist()]


def test_check_tokenizer(tmp_path: Path, tokenizer_dir: Path, other_tokenizer_dir: Path) -> None:
    dataset(tmp_path / "d", [3])
    model, other = tokenizer_dir / "tokenizer.model", other_tokenizer_dir / "tokenizer.model"
    manifest.write(tmp_path / "d", facts(sha256(other)))
    check_tokenizer(tmp_path / "d", other)
    with pytest.raises(UserError) as error:
        check_tokenizer(tmp_path / "d", model)
    assert str(error.value) == (
        f"{tmp_path}/d is a dataset tokenized by another tokenizer than the model's: it was made with"
        f" {sha256(other)}/tokenizer.model (SHA-256 {sha256(other)[:12]}), the model has {model}"
        f" ({sha256(model)[:12]});"
        f" tokenize the corpus again with --tokenizer {tokenizer_dir}"
    )


def test_a_tokenizer_in_two_kinds_of_files_is_the_same_by_either(tmp_path: Path, tokenizer_dir: Path) -> None:
    dataset(tmp_path / "d", [3])
    model, other = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    model.write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    other.write_text("{}")
    both = {path.name: sha256(path) for path in (model, other)}
    manifest.write(tmp_path / "d", facts(both["tokenizer.json"]))
    check_tokenizer(tmp_path / "d", model)  # the dataset by tokenizer.json, the model has both
    made = facts(both["tokenizer.model"])
    made["tokenizer"]["files"] = both
    manifest.write(tmp_path / "d", made)
    model.unlink()
    check_tokenizer(tmp_path / "d", other)  # the dataset with both, the model has tokenizer.json alone
    other.write_text("{} ")
    with pytest.raises(UserError, match="is a dataset tokenized by another tokenizer than the model's"):
        check_tokenizer(tmp_path / "d", other)


def test_check_tokenizer_without_a_manifest_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_tokenizer(tmp_path / "d", tmp_path / "tokenizer.model")
    assert (
        f"{tmp_path}/d has no manifest: whether {tmp_path}/tokenizer.model made its tokens cannot be told"
        in caplog.text
    )


def test_a_negative_token_is_damage(tmp_path: Path) -> None:
    with Writer(tmp_path / "d", np.dtype(np.int32)) as writer:
        writer.add(np.array([5, -7, 6]), np.array([3]))
    with pytest.raises(UserError, match="d is damaged: it holds token -7; tokenize the corpus again"):
        check_vocab(tmp_path / "d", 43)


def test_check_vocab(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [3, 40])  # tokens 0 to 42
    check_vocab(tmp_path / "d", 43)
    with pytest.raises(UserError) as error:
        check_vocab(tmp_path / "d", 42)
    assert str(error.value) == (
        f"{tmp_path}/d does not fit the model: its largest token asks for a vocabulary of 43, the model's embedding has"
        " 42 rows; tokenize the corpus with the model's own tokenizer"
    )
    manifest.write(tmp_path / "d", facts())  # a vocabulary of 300
    check_vocab(tmp_path / "d", 300)
    with pytest.raises(UserError, match="its tokenizer has a vocabulary of 300, the model's embedding has 299 rows"):
        check_vocab(tmp_path / "d", 299)

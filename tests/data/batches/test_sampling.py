"""Samples and blends: their tokens against documents laid end to end with NumPy, the borders of splits."""

from pathlib import Path

import index_twins
import numpy as np
import pytest
from data_help import dataset

from llmpipe.data.batches.sampling import Blend, Samples, split_documents
from llmpipe.data.dataset.indexed import Writer
from llmpipe.errors import UserError

ALL = [1.0, 0.0, 0.0]


def expected_sample(
    documents: list[np.ndarray], index: tuple, number: int, seq_len: int
) -> tuple[list[int], list[int]]:
    """Tokens and boundaries of a sample, read from the whole epoch sequence laid end to end."""
    order, _, shuffle = index
    tokens = np.concatenate([documents[d] for d in order])
    starts = np.cumsum([0, *(len(documents[d]) for d in order)])
    begin = int(shuffle[number]) * seq_len
    inside = {int(start) - begin for start in starts if begin < start <= begin + seq_len}
    return tokens[begin : begin + seq_len + 1].tolist(), sorted(inside)


@pytest.mark.parametrize(("num_samples", "seq_len"), [(5, 7), (40, 7), (3, 100), (60, 1), (9, 2)])
def test_samples_are_windows_of_the_shuffled_documents(tmp_path: Path, num_samples: int, seq_len: int) -> None:
    lengths = [3, 0, 17, 1, 0, 0, 9, 4, 1, 1, 20, 0]
    documents = dataset(tmp_path / "d", lengths)
    split, part, seed = [0.75, 0.25, 0.0], range(9), 42
    samples = Samples(tmp_path / "d", split, "train", seq_len, num_samples, seed)
    index = index_twins.gpt_index(np.array(lengths), part.start, part.stop, seq_len, num_samples, seed)
    assert len(samples) == len(index[2]) >= num_samples
    assert samples.num_epochs == len(index[0]) // len(part)
    for i in range(len(samples)):
        tokens, boundaries = samples[i]
        assert tokens.dtype == np.int64
        assert (tokens.tolist(), boundaries) == expected_sample(documents, index, i, seq_len)


def test_documents_of_several_sequences_are_one(tmp_path: Path) -> None:
    with Writer(tmp_path / "d", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(6), np.array([2, 4]), np.array([2]))
    tokens, boundaries = Samples(tmp_path / "d", ALL, "train", 5, 1, 0)[0]
    assert (tokens.tolist(), boundaries) == ([0, 1, 2, 3, 4, 5], [])


def test_blend_takes_each_datasets_samples_in_turn(tmp_path: Path) -> None:
    dataset(tmp_path / "a", [30] * 20)
    dataset(tmp_path / "b", [25] * 9, first_token=10_000)
    blend = Blend({tmp_path / "a": 3.0, tmp_path / "b": 1.0}, ALL, "train", 8, 50, 7)
    which, number = index_twins.blend_index([0.75, 0.25], 50)
    # asked for 38 and 13 samples, with Megatron's surplus 39 and 14
    parts = [Samples(tmp_path / "a", ALL, "train", 8, 39, 7), Samples(tmp_path / "b", ALL, "train", 8, 14, 7)]
    assert len(blend) == 50
    for i in range(50):
        np.testing.assert_array_equal(blend[i][0], parts[which[i]][int(number[i])][0])


@pytest.mark.parametrize("weights", [(1.0, 1e-6), (1.0, 1.0, 1.0, 1e-9), (0.999, 0.001)])
def test_a_blend_never_runs_out(tmp_path: Path, weights: tuple[float, ...]) -> None:
    for i in range(len(weights)):
        dataset(tmp_path / str(i), [9] * 3)
    blend = Blend({tmp_path / str(i): w for i, w in enumerate(weights)}, ALL, "train", 8, 101, 7)
    assert [len(blend[i][0]) for i in range(101)] == [9] * 101


def test_a_blend_of_hundreds_takes_what_it_is_asked_for(tmp_path: Path) -> None:
    """The greedy choice takes of some more than the surplus gives, where Megatron stops."""
    weights = {tmp_path / str(i): 1.0 + 40 * (i % 2) for i in range(300)}
    for prefix in weights:
        dataset(prefix, [3, 2])
    blend = Blend(weights, ALL, "train", 2, 3000, 1)
    taken = np.bincount(blend.dataset_index, minlength=300)
    assert all(len(one) >= count for one, count in zip(blend.datasets, taken, strict=True))
    assert [len(blend[i][0]) for i in range(3000)] == [3] * 3000


def test_reading_many_is_reading_each(tmp_path: Path) -> None:
    dataset(tmp_path / "a", [3, 14, 7, 1, 0, 9, 20, 2])
    dataset(tmp_path / "b", [25] * 9, first_token=10_000)
    blend = Blend({tmp_path / "a": 3.0, tmp_path / "b": 1.0}, ALL, "train", 8, 50, 7)
    wanted = np.array([49, 3, 3, 0, 17, 8])
    found = [(tokens.tolist(), boundaries) for tokens, boundaries in blend.read(wanted)]
    assert found == [(blend[i][0].tolist(), blend[i][1]) for i in wanted]
    assert any(boundaries for _, boundaries in found)


def test_one_dataset_is_drawn_without_surplus(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [11] * 50)  # 137 samples of 4 tokens an epoch
    assert Blend({tmp_path / "d": 2.0}, ALL, "train", 4, 137, 0).datasets[0].num_epochs == 1


def test_more_datasets_than_their_numbers_are_refused(tmp_path: Path) -> None:
    data = {tmp_path / str(number): 1.0 for number in range(32_767)}
    with pytest.raises(UserError, match="a blend takes 1 to 32,766 datasets, not 32,767: join some with llmpipe merge"):
        Blend(data, ALL, "train", 4, 1, 0)
    with pytest.raises(UserError, match="a blend takes 1 to 32,766 datasets, not 0"):
        Blend({}, ALL, "train", 4, 1, 0)


def test_more_samples_than_the_index_holds_are_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [5])
    with pytest.raises(UserError, match=r"d cannot give 8589934592 samples of 4 tokens: more than 2\^32 - 2 samples"):
        Samples(tmp_path / "d", ALL, "train", 4, 2**33, 0)


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [11] * 50)

    def order(seed: int) -> list[int]:
        samples = Samples(tmp_path / "d", ALL, "train", 4, 100, seed)
        return [int(samples[i][0][0]) for i in range(100)]

    assert order(1) == order(1) != order(2)


@pytest.mark.parametrize(
    ("num_documents", "split", "expected"),
    [
        (1000, [969, 30, 1], [969, 30, 1]),
        (10, [969, 30, 1], [10, 0, 0]),  # 9.69 and 9.99 both round to 10
        (5, [0.5, 0.5, 0.0], [2, 3, 0]),  # 2.5 rounds to the even 2, as Python's round
        (7, [0.5, 0.5, 0.0], [4, 3, 0]),  # and 3.5 to the even 4
        (3, [0, 0, 2], [0, 0, 3]),
        (0, [969, 30, 1], [0, 0, 0]),
    ],
)
def test_split_rounds_at_the_borders(num_documents: int, split: list[float], expected: list[int]) -> None:
    parts = [split_documents(num_documents, split, part) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == expected
    assert [document for part in parts for document in part] == list(range(num_documents))


@pytest.mark.parametrize("split", [[1.0, 1.0], [1.0, -1.0, 2.0], [0.0, 0.0, 0.0], []])
def test_impossible_splits_are_refused(split: list[float]) -> None:
    with pytest.raises(UserError) as error:
        split_documents(10, split, "train")
    assert str(error.value) == (
        f"split {split} has to be three shares, of train, validation, test, none negative and not all 0"
    )


def test_a_part_without_tokens_is_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "d", [5, 5, 0])
    with pytest.raises(UserError) as error:
        Samples(tmp_path / "d", [969, 30, 1], "test", 4, 1, 0)
    assert str(error.value) == (
        f"the test part of {tmp_path}/d holds no tokens: split [969, 30, 1] gives it 0 of 3 documents;"
        " give it a larger share"
    )
    with pytest.raises(UserError, match=r"the test part of .* gives it 1 of 3 documents"):
        Samples(tmp_path / "d", [2, 0, 1], "test", 4, 1, 0)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_above_0_is_refused(tmp_path: Path, weight: float) -> None:
    dataset(tmp_path / "d", [5])
    with pytest.raises(UserError, match=f"the weight of .*d is {weight}, but has to be above 0"):
        Blend({tmp_path / "d": weight}, ALL, "train", 4, 1, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_does_not_take_is_refused(tmp_path: Path, seed: int) -> None:
    dataset(tmp_path / "d", [5])
    with pytest.raises(UserError, match=f"seed {seed} has to be 0 to 4294967295"):
        Samples(tmp_path / "d", ALL, "train", 4, 1, seed)

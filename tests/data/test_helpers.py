"""The compiled helpers against NumPy twins, and against arrays that megatron-core itself made."""

import hashlib

import index_twins
import numpy as np
import pytest

from llmpipe import helpers

# SHA-256, cut to 16 digits, of megatron-core 0.16.1's own arrays: GPTDataset._build_document_sample_shuffle_indices of
# documents 20..989 of LENGTHS at sequence length 64, written as <i4, <i8 and <u4. 500 samples are part of one epoch,
# 7377 are 3.3 epochs (the last shuffled apart), 6594 are 2.95 epochs (all shuffled together).
LENGTHS = np.random.RandomState(7).randint(0, 300, 1000).astype(np.int64)
MEGATRON = {
    (500, 1234): ("79228ba9a255b3e1", "f14e3e22a6d52bbc", "3e77f1fdc455b25b"),
    (500, 4294967295): ("73d95b1302cc1f3b", "c54451f6f8447b2f", "c8ddf6e6003a9ba3"),
    (7377, 1234): ("74c2d002f3e6df0d", "4508ad8324194bd6", "1cea2f0fa463a407"),
    (7377, 4294967295): ("e2664d6807a5f41e", "dd319dcdf82d471a", "15aa1f47fe38a937"),
    (6594, 1234): ("955d7868e591fc79", "8fd6e250a19a8779", "927d2d7b93c788fb"),
    (6594, 4294967295): ("e96b57ffeb0fea5a", "11f07fa1b412bf22", "17db4b0564ee0a2f"),
}


def fingerprint(array: np.ndarray, dtype: str) -> str:
    return hashlib.sha256(array.astype(dtype).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("num_samples", "seed"), MEGATRON)
def test_gpt_index_is_megatrons(num_samples: int, seed: int) -> None:
    found = helpers.gpt_index(LENGTHS, 20, 990, 64, num_samples, seed)
    assert tuple(map(fingerprint, found, ("<i4", "<i8", "<u4"))) == MEGATRON[num_samples, seed]


def test_blend_index_is_megatrons() -> None:
    """As above: megatron-core 0.16.1's build_blending_indices with weights 1, 3, 6.5 over their sum, 1000 samples."""
    weights = np.array([1.0, 3.0, 6.5])
    datasets, samples = helpers.blend_index(weights / weights.sum(), 1000)
    assert fingerprint(datasets, "<i2") == "4edff5211f4f8e7b"
    assert fingerprint(samples, "<i8") == "2d59172362166468"


def test_gpt_index_equals_the_twin_on_random_datasets() -> None:
    random, several_epochs = np.random.default_rng(0), 0
    for _ in range(300):
        lengths = random.integers(0, 40, random.integers(2, 60))
        first = int(random.integers(0, len(lengths) - 1))
        last = int(random.integers(first + 1, len(lengths) + 1))
        seq_len, num_samples = int(random.integers(1, 50)), int(random.integers(1, 200))
        if lengths[first:last].sum() < 2:
            continue
        arguments = (lengths, first, last, seq_len, num_samples, int(random.integers(0, 2**32)))
        found, expected = helpers.gpt_index(*arguments), index_twins.gpt_index(*arguments)
        several_epochs += len(found[0]) > last - first
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert several_epochs > 100


def test_shuffles_longer_than_a_block_and_a_power_of_two() -> None:
    lengths = np.full(2**16 + 1, 3)
    arguments = (lengths, 0, len(lengths), 2, 90_000, 99)
    for ours, theirs in zip(helpers.gpt_index(*arguments), index_twins.gpt_index(*arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_shuffles_as_long_as_some_blocks_or_one_more_or_less() -> None:
    for count in range(1, 270):
        arguments = (np.full(count, 3), 0, count, 2, 5 * count // 2, count)
        for ours, theirs in zip(helpers.gpt_index(*arguments), index_twins.gpt_index(*arguments), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_documents_whose_lengths_take_more_than_two_bytes() -> None:
    lengths = np.array([7, 2**16 - 1, 0, 2**16 - 2, 2**16, 1, 2**17 + 3, 65_535, 5])
    for first, num_samples in ((0, 30), (1, 900), (2, 1000)):
        arguments = (lengths, first, 8, 1000, num_samples, 3)
        for ours, theirs in zip(helpers.gpt_index(*arguments), index_twins.gpt_index(*arguments), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.2, 0.3, 0.5], [0.01, 0.99], [1 / 7] * 7])
def test_blend_index_equals_the_twin(weights: list[float]) -> None:
    for ours, theirs in zip(
        helpers.blend_index(np.array(weights), 500), index_twins.blend_index(weights, 500), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_types_of_the_indices_are_megatrons() -> None:
    documents, samples, order = helpers.gpt_index(np.array([5, 6]), 0, 2, 2, 4, 1)
    assert (documents.dtype, samples.dtype, order.dtype) == (np.int32, np.int32, np.uint32)
    assert samples.shape == (len(order) + 1, 2)
    assert [array.dtype for array in helpers.blend_index(np.array([1.0]), 3)] == [np.int16, np.int64]


@pytest.mark.parametrize(("longest", "dtype"), [(2**31 - 1, np.int32), (2**31, np.int64), (2**35, np.int64)])
def test_places_that_int32_does_not_hold(longest: int, dtype: type) -> None:
    """Megatron's rule: the longest document, and how many there are, say which type the places of samples have."""
    arguments = (np.array([4, longest, 9]), 0, 3, 2**29, longest // 2**29 + 2, 5)
    found = helpers.gpt_index(*arguments)
    assert found[1].dtype == dtype
    for ours, theirs in zip(found, index_twins.gpt_index(*arguments), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.array([0, 0]), 0, 2, 4, 1, 1), "the documents hold no tokens"),
        ((np.array([3, -1]), 0, 2, 4, 1, 1), "document 1 has a negative length"),
        ((np.array([3, 4]), 0, 3, 4, 1, 1), "documents 0 to 3 are not among the 2 documents"),
        ((np.array([3, 4]), -1, 2, 4, 1, 1), "documents -1 to 2 are not among the 2 documents"),
        ((np.array([3, 4]), 0, 2, 0, 1, 1), "seq_len and num_samples have to be 1 or more"),
        ((np.array([3, 4]), 0, 2, 4, 0, 1), "seq_len and num_samples have to be 1 or more"),
        ((np.array([3, 4]), 0, 2, 1, 2**33, 1), "more than 2^32 - 2 samples"),
        ((np.array([3, 4]), 0, 2, 2**30, 1, 1), "longer than 2^30 - 1 tokens"),
        ((np.array([2**62, 2**62]), 0, 2, 4, 1, 1), "the documents hold more than 2^61 tokens"),
    ],
)
def test_gpt_index_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("^", r"\^")):
        helpers.gpt_index(*arguments)


def test_blend_index_refuses_no_dataset() -> None:
    with pytest.raises(ValueError, match="a blend takes 1 to 32766 datasets"):
        helpers.blend_index(np.array([]), 3)
    with pytest.raises(ValueError, match="num_samples has to be 0 or more"):
        helpers.blend_index(np.array([1.0]), -1)


# Documents of 3, 0, 4 and 5 tokens, in this order, then again; samples of 4 tokens and the next one's first.
WINDOWS = {
    "tokens": np.arange(10, 22, dtype=np.uint16),
    "starts": np.array([0, 3, 3, 7, 12]),
    "documents": np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32),
    "samples": np.array([0, 0, 2, 1, 3, 1, 4, 0, 6, 1, 7, 1]),
    "order": np.array([4, 0, 3, 1, 2], np.uint32),
    "wanted": np.array([1, 2, 0]),
    "seq_len": 4,
}


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", "<u2", "<i4", "<i8", "<f4", "<f8"])
def test_read_samples(dtype: str) -> None:
    rows, starts, ends = helpers.read_samples(**WINDOWS | {"tokens": WINDOWS["tokens"].astype(dtype)})
    assert rows.tolist() == [[10, 11, 12, 13, 14], [10, 11, 12, 13, 14], [14, 15, 16, 17, 18]]
    assert starts.tolist() == [3, 3, 3]
    assert ends.tolist() == [1, 2, 3]


def test_places_of_samples_are_read_in_either_type() -> None:
    for ours, other in zip(
        helpers.read_samples(**WINDOWS | {"samples": WINDOWS["samples"].astype(np.int32)}),
        helpers.read_samples(**WINDOWS),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wanted": np.array([5])}, "there is no sample 5 among 5"),
        ({"wanted": np.array([-1])}, "there is no sample -1 among 5"),
        (
            {"order": np.array([6], np.uint32), "wanted": np.array([0])},
            "the order names sample 6, which the index has not",
        ),
        ({"documents": np.array([9], np.int32)}, "the index names document 9, which the dataset has not"),
        ({"documents": np.array([0], np.int32)}, "a sample asks for document 1 of an index of 1"),
        ({"tokens": np.arange(6, dtype=np.uint16)}, "document 2 is outside the tokens"),
        ({"starts": np.array([0, 3, 3, 2, 12])}, "document 2 is outside the tokens"),
        ({"samples": np.full(12, 7)}, "sample 0 starts outside its document"),
        ({"samples": np.zeros(12, np.float32)}, "samples have to be int32 or int64"),
        ({"samples": np.full(12, 7, np.int32)}, "sample 0 starts outside its document"),
        ({"seq_len": 0}, "seq_len has to be 1"),
        ({"tokens": np.zeros(12, np.uint32)}, "tokens of this type are not read"),
    ],
)
def test_read_samples_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        helpers.read_samples(**WINDOWS | changes)


def test_byte_pointers() -> None:
    sizes = np.array([3, 0, 2**31 - 1, 4], np.int32)
    expected = np.concatenate([[100], 100 + np.cumsum(sizes.astype(np.int64) * 4)[:-1]])
    np.testing.assert_array_equal(helpers.byte_pointers(sizes, 4, 100), expected)
    assert helpers.byte_pointers(np.array([], np.int32), 2).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [3, -2, 4]}, "sequence 1 has -2 tokens"),
        ({"pointers": [0, 6, 9]}, "sequence 2 starts at byte 9, but the sizes before it say byte 10"),
        ({"pointers": [0, 6]}, "3 sizes, but 2 pointers"),
        ({"bin_bytes": 16}, "the index describes 18 bytes of tokens, but the .bin has 16"),
        ({"documents": []}, "the document index is empty, but has to start with 0"),
        ({"documents": [1, 3]}, "the document index starts with 1, but has to start with 0"),
        ({"documents": [0, 2, 1, 3]}, "document 2 starts at sequence 1, before document 1 at sequence 2"),
        ({"documents": [0, 2]}, "the document index ends at sequence 2, but there are 3 sequences"),
    ],
)
def test_check_index_refuses(changes: dict, message: str) -> None:
    good = {"sizes": [3, 2, 4], "pointers": [0, 6, 10], "documents": [0, 2, 3], "item_bytes": 2, "bin_bytes": 18}
    types = {"sizes": np.int32, "pointers": np.int64, "documents": np.int64}

    def check(values: dict) -> None:
        helpers.check_index(**{k: np.array(v, types[k]) if k in types else v for k, v in values.items()})

    check(good)
    with pytest.raises(ValueError, match=message):
        check(good | changes)

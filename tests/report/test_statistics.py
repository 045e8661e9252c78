"""Lengths, packing use and mask share, by hand; and beside what the loader gives out."""

from pathlib import Path

import numpy as np
import pytest
from report_project import make_chats, make_texts

from llmpipe.data.batches.packing import ChatSamples
from llmpipe.data.dataset.roles import ASSISTANT, PADDING, TEMPLATE, USER
from llmpipe.data.statistics import length_ranges, statistics

WHOLE = [1.0, 0.0, 0.0]


def test_texts_fill_every_position(tmp_path: Path) -> None:
    make_texts(tmp_path / "c", [5, 0, 3, 8])
    found = statistics(tmp_path / "c", WHOLE, "train", seq_len=4, seed=1)
    assert (found.documents, found.tokens, found.shortest, found.longest) == (4, 16, 0, 8)
    assert (found.median, found.mean, found.packing_use) == (4.0, 4.0, 1.0)
    assert found.mask_share == pytest.approx(13 / 16)  # the last tokens of three documents predict another's first
    crossing = statistics(tmp_path / "c", WHOLE, "train", seq_len=4, seed=1, isolate_documents=False)
    assert crossing.mask_share == 1.0


def test_only_the_part_that_is_trained_on_counts(tmp_path: Path) -> None:
    make_texts(tmp_path / "c", [2] * 9 + [30])
    assert statistics(tmp_path / "c", [9.0, 1.0, 0.0], "train", seq_len=4, seed=1).longest == 2
    assert statistics(tmp_path / "c", [9.0, 1.0, 0.0], "validation", seq_len=4, seed=1).longest == 30


def test_chats_by_hand(tmp_path: Path) -> None:
    """Positions 4, 4, 2 in sequences of 8: two sequences. Labels are all tokens but the first of each chat."""
    chats = [
        [USER, USER, ASSISTANT, ASSISTANT, TEMPLATE],
        [ASSISTANT, USER, USER, ASSISTANT, PADDING],
        [USER, USER, ASSISTANT],
    ]
    make_chats(tmp_path / "c", chats)
    found = statistics(tmp_path / "c", WHOLE, "train", seq_len=8, seed=1)
    assert found.packing_use == pytest.approx(10 / 16)
    assert found.mask_share == pytest.approx(4 / 10)
    assert statistics(tmp_path / "c", WHOLE, "train", seq_len=8, seed=1, packing=False).packing_use is None


def test_chats_as_the_loader_packs_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    make_chats(tmp_path / "c", [random.integers(0, 3, size).tolist() for size in random.integers(1, 30, 200)])
    found = statistics(tmp_path / "c", WHOLE, "train", seq_len=32, seed=5)
    samples = ChatSamples(tmp_path / "c", WHOLE, "train", 32, 0, 5)
    rows = [samples[number] for number in range(samples.samples_per_epoch)]
    trained = sum(int(row.weights.sum()) for row in rows)
    assert found.packing_use is not None
    assert found.mask_share * found.packing_use == pytest.approx(trained / (32 * len(rows)))


def test_ranges_are_those_of_a_histogram_of_numpy() -> None:
    lengths = np.random.default_rng(0).integers(1, 5000, 1000)
    ranges = length_ranges(lengths)
    counts, _ = np.histogram(lengths, bins=[*(first for first, _, _ in ranges), ranges[-1][1] + 1])
    assert [count for *_, count in ranges] == counts.tolist()
    assert length_ranges(np.array([0, 0, 1, 3])) == [(0, 0, 2), (1, 1, 1), (2, 3, 1)]

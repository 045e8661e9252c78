"""How often a blend has been through its data, counted from the samples that it gives."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llmpipe.data.batches.sampling import Blend, Samples, split_documents


def test_one_dataset_is_through_when_its_tokens_are(dataset: Path) -> None:
    blend = Blend({dataset: 1.0}, [80, 10, 10], "train", 32, 1000, seed=1)
    reader, documents = blend.datasets[0].reader, split_documents(400, [80, 10, 10], "train")
    tokens = int(reader.lengths[documents.start : documents.stop].sum())
    assert blend.epoch(500) == pytest.approx(500 * 32 / tokens)


def test_of_several_the_one_that_comes_round_the_most_often_counts(dataset: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    for kind in (".bin", ".idx"):
        small.with_suffix(kind).write_bytes(dataset.with_suffix(kind).read_bytes())
    splits = {dataset: 1.0, small: 3.0}
    blend = Blend(splits, [80, 10, 10], "train", 32, 1000, seed=1)
    taken = Counter(blend.dataset_index[:400].tolist())
    samples = Samples(small, [80, 10, 10], "train", 32, 10, 1)
    assert blend.epoch(400) == pytest.approx(taken[1] / samples.samples_per_epoch, rel=0.01)
    assert np.isfinite(blend.epoch(1))

"""Damaged datasets never crash a reader, are never read beyond their ends, and never pass for sound ones."""

from pathlib import Path

import pytest
from fuzz import SOUND, fuzz, fuzz_helpers


def test_damaged_files(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 500, 0)
    assert found["refused"] > 1000
    assert found["read"] > 100  # what only a hash can tell: another token, another border between documents


def test_wild_arrays() -> None:
    found = fuzz_helpers(10_000, 0)
    assert found["refused"] > 1000
    assert found["read"] > 100


@pytest.mark.slow
def test_a_hundred_thousand(tmp_path: Path) -> None:
    found = fuzz(tmp_path, -(-100_000 // len(SOUND)), 1)
    assert found["refused"] > 50_000 and found["read"] > 1000
    assert fuzz_helpers(100_000, 1)["refused"] > 50_000

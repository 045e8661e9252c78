"""Damaged datasets never crash a reader, are never read beyond their ends, and never pass for sound ones."""

from pathlib import Path

from fuzz import fuzz, fuzz_helpers


def test_damaged_files(tmp_path: Path) -> None:
    found = fuzz(tmp_path, 500, 0)
    assert found["refused"] > 1000
    assert found["read"] > 100  # what only a hash can tell: another token, another border between documents


def test_wild_arrays() -> None:
    found = fuzz_helpers(10_000, 0)
    assert found["refused"] > 1000
    assert found["read"] > 100

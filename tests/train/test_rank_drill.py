"""The short form of benchmarks/rank_drill.py, which raises where anything is not as it should be."""

from pathlib import Path

import pytest


def test_killed_ranks_are_started_again_and_nothing_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from rank_drill import drill  # type: ignore[import-not-found]

    lines = drill(tmp_path, ranks=4, kills=2, in_saves=1, seed=1)
    assert sum("was written" in line for line in lines) >= 1 and lines[-1].endswith("bit for bit")

"""Greedy text of both: what parts, what was a tie, and what needs too much memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmpipe.errors import UserError
from llmpipe.export import greedy
from llmpipe.export.export import export


def answers(tokens: list[int], top: float) -> greedy.Answers:
    """Four prompts continued by `tokens`; the second step's logits are 1 for token 0 and `top` for token 1."""
    logits = np.array([[0.0, 1.0, 0.0], [1.0, top, 0.0]])
    return greedy.Answers([tokens] * 4, [logits] * 4)


def test_greedy_text_that_parts_is_refused_unless_it_was_a_tie() -> None:
    ours = answers([1, 0], top=0.5)
    assert greedy.check_greedy(ours, [[1, 0]] * 4) == 0
    with pytest.raises(UserError) as raised:
        greedy.check_greedy(ours, [[1, 1]] * 4)
    assert str(raised.value) == (
        "transformers on the export continues 'Hello world' with token 1 at step 2, the trained model with 0,"
        " 0.5 above it; nothing was exported"
    )
    assert greedy.check_greedy(answers([1, 0], top=0.99999), [[1, 1]] * 4) == 4


def test_with_too_little_memory_it_is_not_run_and_that_is_said(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpipe.export.greedy.available_bytes", lambda: 1000)
    export(run, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert "texts" not in found
    row = found["checks"][-1]
    assert row["verdict"] == "not run"
    assert row["detail"].startswith("0.000194 GiB are needed in fp32, more than were free")  # 40,096 parameters

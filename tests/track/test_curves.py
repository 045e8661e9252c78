"""Lines of a file that is being written."""

from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.track.curves import Curves, Lines


def reader(path: Path, growing: bool = True) -> Lines:
    return Lines(Curves(path=path, done_tag="t", growing=growing))


def test_each_call_gives_what_is_new(tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    lines = reader(path)
    assert list(lines.new()) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert list(lines.new()) == [(1, {"step": 1}), (2, {"step": 2})]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert list(lines.new()) == [(3, {"step": 3})]
    assert list(lines.new()) == []


@pytest.mark.parametrize("again", ['{"step": 1}\n', '{"step": 1}\n{"step": "2 again"}\n{"step": 3}\n'])
def test_a_file_that_was_cut_back_is_read_again(tmp_path: Path, again: str) -> None:
    path = tmp_path / "live.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines = reader(path)
    list(lines.new())
    path.write_text(again)
    assert [number for number, _ in lines.new()] == list(range(1, again.count("\n") + 1))


def test_half_a_line_is_damage_where_nothing_comes_any_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    assert len(list(reader(path).new())) == 1
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged \(.*\): run finetune again"):
        list(reader(path, growing=False).new())


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "node.jsonl"
    path.write_text('{"a": 1}\n{"a"{"a": 3}\n{"a": 4}\n')
    assert list(reader(path).new()) == [(1, {"a": 1}), (3, {"a": 4})]


def test_charts_have_sections_and_units() -> None:
    line = {
        "step": 7, "loss": 2.5, "skipped": "spike", "skipped_steps": 0, "loss_scale": 1.0, "grad_norm": None,
        "memory_bytes": 2_500_000_000, "time": 12.5,
    }  # fmt: skip
    points = Curves(path=Path("p"), done_tag="t").points(7, line, start_ms=1)
    assert [(point.chart, point.value, point.step, point.time_ms) for point in points] == [
        ("loss/train", 2.5, 7, 12500), ("speed/peak_memory_gigabytes", 2.5, 7, 12500)
    ]  # fmt: skip
    assert {point.chart for point in Curves(path=Path("p"), done_tag="t").points(1, {"loss_scale": 64}, 1)} == {
        "optimizer/loss_scale"
    }
    (busy,) = Curves(path=Path("p"), done_tag="t", host="n1").points(3, {"cpu_utilization_percentage": 5.0}, 99)
    assert (busy.chart, busy.step, busy.time_ms) == ("system/n1/cpu_utilization_percentage", 3, 99)
    (busy,) = Curves(path=Path("p"), done_tag="t", host="n1", alone=True).points(3, {"cpu": 5.0}, 99)
    assert busy.chart == "system/cpu"

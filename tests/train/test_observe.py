"""What each rank tells of its steps: lines and traces; and that they are asked for in words."""

import json
from dataclasses import replace

import pytest
from jobs import RECIPE, make_job, run_job

from llmpipe.errors import UserError
from llmpipe.train.job import parse_steps


def test_each_rank_tells_of_every_step_once_and_traces_those_asked_for(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, steps=5, save_every=2), tp=2)
    job = replace(job, all_ranks=True, profile_steps=[2, 3])
    run_job(replace(job, exit_at_step=3))
    run_job(job)
    for rank in range(2):
        lines = [json.loads(line) for line in (job.run / f"ranks/rank-{rank}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
        for line in lines:
            seconds = {key: value for key, value in line.items() if key.endswith("_seconds")}
            phases = ["data", "forward_backward", "reduce", "optimizer", "evaluate", "save"]
            assert list(seconds) == [f"{phase}_seconds" for phase in phases]
            assert seconds["forward_backward_seconds"] > 0 and line["memory_bytes"] > 1 << 20
        trace = json.loads((job.run / f"profile/rank-{rank}.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        # The fused or the foreach AdamW of two steps; the loss is looked at once a micro-batch.
        assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 2
        assert any(name == "aten::mm" for name in names)


def test_nothing_is_told_unasked(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, steps=1))
    run_job(job)
    assert not (job.run / "ranks").exists() and not (job.run / "profile").exists()


def test_steps_to_profile() -> None:
    assert [parse_steps(text) for text in (None, "10-12", "7")] == [[], [10, 12], [7, 7]]
    for wrong in ("12-10", "0", "a-b", "3-x", "-3"):
        with pytest.raises(UserError, match="steps counted from 1 are expected"):
            parse_steps(wrong)

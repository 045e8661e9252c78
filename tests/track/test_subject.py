"""What is read of a run's and of a model's folder."""

import json
from pathlib import Path

import pytest
from run_folders import make_model, make_run

from llmpipe.errors import UserError
from llmpipe.track.subject import flat, metric_name, subjects


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("results/models/m"))
    (subject,) = subjects(make_run(Path("results/runs/r")))
    assert (subject.kind, subject.name, subject.end_ms - subject.start_ms) == ("run", "r", 6000)
    assert subject.params == {
        "recipe.lr": "0.001", "recipe.betas": "0.9,0.95", "recipe.schedule.kind": "cosine", "layout.tp": "2",
        "split": "969,30,1", "model": "results/models/m/tp2-pp2", "data.c": "1.0", "shape.hidden": "32",
    }  # fmt: skip
    assert subject.tags == {
        "exit_reason": "finished", "llmpipe": "0.1.0", "torch": "2.13", "model.checkpoint_digest": "cd",
        "data.c.digest": "dd",
    }  # fmt: skip
    assert subject.metrics == {
        "total.steps": 3.0, "total.tokens": 96.0, "total.seconds": 6.0, "verify.max_logit": 1e-6,
        "tp2-pp2.verify.bytes": 0.0,
        "evaluate.perplexity.perplexity.before": 10.0, "evaluate.perplexity.perplexity.after": 8.0,
    }  # fmt: skip
    assert sorted(subject.artifacts) == [
        "config/recipes/same.yaml", "config/runs/same.yaml", "evaluate/table.json", "metrics.jsonl", "run.json",
        "verify/tp2-pp2.verify.json", "verify/verify.json", "verify/verify.md", "weights/manifest.json",
    ]  # fmt: skip


def test_a_results_folder_gives_what_is_finished(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "m")
    make_run(tmp_path / "runs" / "b")
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "unfinished").mkdir()
    assert [(s.kind, s.name) for s in subjects(tmp_path)] == [("model", "m"), ("run", "a"), ("run", "b")]
    (subject,) = subjects(tmp_path / "models" / "m")
    assert subject.params["config.hidden_size"] == "32" and "checkpoint/manifest.json" in subject.artifacts


def test_nothing_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        subjects(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} holds nothing finished: a run's folder has run.json, a model's has checkpoint/manifest.json, a"
        " results folder has such folders in runs/ and models/; finish a stage first"
    )


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged \(.*\): run finetune again"):
        subjects(run)
    (run / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged \(.*\): run the stage that makes it again"):
        subjects(run)


def test_a_run_without_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
    (run / "weights" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"r has run.json but no weights/manifest.json: run finetune again"):
        subjects(run)


def test_a_run_that_says_little(tmp_path: Path) -> None:
    """run.json of another version of llmpipe: what is missing is left out."""
    (tmp_path / "run.json").write_text(json.dumps({"weights_digest": "d"}))
    (subject,) = subjects(tmp_path)
    assert (subject.digest, subject.params, subject.metrics, subject.curves) == ("d", {}, {}, [])


def test_names() -> None:
    assert flat({"a": {"b": [1, 2]}, "c": None, "d": True}) == {"a.b": "1,2", "d": "True"}
    assert metric_name("max|Δlogit| (fp32)") == "max_Δlogit_ _fp32_"

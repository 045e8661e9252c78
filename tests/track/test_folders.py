"""What is read of a run's and of a model's folder."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_folders import START, make_corpus, make_export, make_live, make_model, make_run
from snakemake.benchmark import benchmarked, write_benchmark_records

from llmpipe.errors import UserError
from llmpipe.track.describe import in_lines
from llmpipe.track.folders import subjects
from llmpipe.track.stages import SEEN_AFTER, benchmark
from llmpipe.track.subject import flat, metric_name


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(Path("results/models/m"))
    (subject,) = subjects(make_run(Path("results/runs/r")))
    assert (subject.kind, subject.name, subject.status) == ("run", "r", "FINISHED")
    assert (subject.identity, subject.start_ms) == ("0123456789abcdef", 1000 * START)
    assert subject.params == {
        "recipe.lr": "0.001", "recipe.betas": "0.9,0.95", "recipe.schedule.kind": "cosine", "layout.nodes": "1",
        "layout.gpus_per_node": "2", "layout.tp": "2", "layout.device": "cpu", "split": "969,30,1",
        "model": "results/models/m/tp2-pp2", "data.c": "1.0",
    }  # fmt: skip
    assert subject.tags == {
        "exit_reason": "finished", "llmpipe": "0.1.0", "torch": "2.13", "model.checkpoint_digest": "cd",
        "data.c.digest": "dd", "git_commit": "c0ffee", "config_digest": "cfg", "hosts": "node7",
        "command": "llmpipe finetune recipe.yaml", "layout": "1 node of 2 cpu, tp 2, pp 1, cp 1, dp 1",
        "mlflow.source.name": "llmpipe finetune", "mlflow.source.type": "LOCAL", "mlflow.user": "ada",
        "mlflow.source.git.commit": "c0ffee",
    }  # fmt: skip
    assert subject.metrics == {
        "tasks/perplexity/perplexity_before": 10.0,
        "tasks/perplexity/perplexity_after": 8.0,
    }
    assert sorted(subject.artifacts) == [
        "config/recipes/same.yaml", "config/runs/same.yaml", "evaluate/table.json", "evaluate/table.md",
        "metrics.jsonl", "run.json", "verify/tp2-pp2.verify.json", "verify/verify.json", "verify/verify.md",
        "weights/manifest.json",
    ]  # fmt: skip
    assert [(item.name, item.digest, item.part) for item in subject.datasets] == [("c", "dd", "train")]
    assert "```\nllmpipe finetune recipe.yaml\n```" in subject.description
    assert "| perplexity | perplexity | 10 | 8 |" in subject.description and "**pass**" in subject.description


def test_memory_is_what_snakemake_measures(tmp_path: Path) -> None:
    """Of a process with 300 MB, by the code that writes the workflow's benchmark files."""
    code = "held = b'x' * 300_000_000; print(flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin and holder.stdout
    holder.stdout.readline()
    with benchmarked(holder.pid) as record:
        resident = psutil.Process(holder.pid).memory_info().rss
        time.sleep(SEEN_AFTER)
    holder.communicate(b"\n")
    file = tmp_path / "holder.benchmark.tsv"
    write_benchmark_records([record], str(file), extended_fmt=False)
    assert benchmark(file)["peak_memory_megabytes"] == pytest.approx(resident / 1e6, rel=0.01)
    file.write_text("s\th:m:s\tmax_rss\n0.43\t0:00:00\t6.00\n")  # of the shell: no command is that small
    assert benchmark(file) == {"seconds": 0.43}


def test_the_stages_of_a_run_are_those_that_left_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("results/runs/r"))
    assert [stage.name for stage in subjects(run)[0].stages] == ["finetune", "evaluate"]
    make_model(Path("results/models/m"))
    make_corpus(Path("corpora/c"))
    make_export(run)
    log = Path("logs/convert/m.benchmark.tsv")
    log.parent.mkdir(parents=True)
    log.write_text("s\th:m:s\tmax_rss\n12.5\t0:00:12\tNA\n")
    stages = {stage.name: stage for stage in subjects(run)[0].stages}
    assert list(stages) == ["tokenize c", "convert", "shard", "verify", "finetune", "evaluate", "export"]
    assert stages["tokenize c"].metrics == {"documents": 3.0, "tokens": 90.0}
    assert stages["tokenize c"].params == {"bos": "True", "tokenizer.path": "t", "tokenizer.vocab_size": "32"}
    assert stages["convert"].params == {"source.path": "weights/m", "config.hidden_size": "32"}
    assert stages["convert"].metrics["seconds"] == 12.5
    assert stages["convert"].end_ms - stages["convert"].start_ms == 12500
    assert stages["verify"].metrics == {"verify/max_logit": 1e-6, "tp2-pp2.verify/bytes": 0.0}
    assert stages["verify"].tags["verdict.verify"] == "pass"
    assert stages["finetune"].metrics["total_steps"] == 3.0 and stages["finetune"].metrics["loss/train"] == 5 / 3
    assert stages["export"].params == {"source.format": "hf"}
    assert len({stage.identity for stage in stages.values()}) == len(stages)


def test_a_run_that_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same MLflow run as when it has ended."""
    monkeypatch.chdir(tmp_path)
    (subject,) = subjects(make_live(tmp_path / "r"))
    assert (subject.status, subject.params["recipe.lr"], subject.curves[0].path.name) == (
        "RUNNING",
        "0.001",
        "live.jsonl",
    )
    (tmp_path / "r" / "failure.json").write_text(json.dumps({"attempt": 0, "final": True, "error": "of no use"}))
    assert subjects(tmp_path / "r")[0].status == "FAILED"
    (ended,) = subjects(make_run(tmp_path / "r"))
    assert (ended.identity, ended.start_ms, ended.status) == (subject.identity, subject.start_ms, "FINISHED")


def test_the_stamp_is_the_same_wherever_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of run.json count from the project's folder: one who stands elsewhere finds the same files."""
    make_model(tmp_path / "results/models/m")
    run = make_run(tmp_path / "results/runs/one")
    stamps = set()
    for folder in (tmp_path, tmp_path / "results"):
        monkeypatch.chdir(folder)
        (found,) = subjects(run)
        assert found.artifacts["verify/verify.json"].is_file()
        stamps.add(found.stamp())
    assert len(stamps) == 1


def test_the_stamp_changes_with_any_file_of_any_stage(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "r")
    stamps = [subjects(run)[0].stamp(), subjects(run)[0].stamp()]
    (run / "log.txt").write_text("a log, which is finetune's")
    stamps.append(subjects(run)[0].stamp())
    (run / "metrics.jsonl").write_text("")
    stamps.append(subjects(run)[0].stamp())
    assert stamps[0] == stamps[1] and len(set(stamps)) == 3


def test_a_results_folder_gives_what_is_begun(tmp_path: Path) -> None:
    make_model(tmp_path / "models" / "m")
    make_run(tmp_path / "runs" / "b")
    make_live(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "nothing").mkdir()
    found = [(s.kind, s.name) for s in subjects(tmp_path)]
    assert found == [("model", "m (model)"), ("run", "a"), ("run", "b")]
    (subject,) = subjects(tmp_path / "models" / "m")
    assert subject.params["config.hidden_size"] == "32" and "checkpoint/manifest.json" in subject.artifacts


def test_nothing_to_track(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        subjects(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} holds nothing to track: a run's folder has run.json, or job.json while it trains, a model's has"
        " checkpoint/manifest.json, a results folder has such folders in runs/ and models/; make one first"
    )


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r")
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


def test_a_command_has_an_option_a_line() -> None:
    """It stays the same command to the shell, quotes and all."""
    command = "llmpipe finetune 'my recipe.yaml' --data a=1 --data 'b --c=2' --save"
    shown = in_lines(command)
    assert shown.splitlines()[:2] == ["llmpipe finetune 'my recipe.yaml' \\", "    --data a=1 \\"]
    printed = "printf '%s\\n' "
    assert subprocess.check_output(printed + shown, shell=True) == subprocess.check_output(
        printed + command, shell=True
    )

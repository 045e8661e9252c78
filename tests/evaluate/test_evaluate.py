"""`llmpipe evaluate`: what a run brings along, what is published, what is refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmpipe.checkpoint.convert import shard
from llmpipe.cli.evaluate import command
from llmpipe.data.dataset.join import lay_end_to_end
from llmpipe.errors import UserError
from llmpipe.evaluate.plan import make_plan
from llmpipe.layout import Stages
from tiny_llama import make_dataset


@pytest.fixture(scope="module")
def dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(checkpoint, tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def run(checkpoint: Path, dataset: Path, tmp_path: Path) -> Path:
    """A finished run's folder, which trained nothing."""
    shard(checkpoint, tmp_path / "run" / "weights", 2, Stages(2))
    record = {"name": "run", "data": [{"prefix": str(dataset)}], "split": [18, 1, 1], "recipe": {"seq_len": 32}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run"


def evaluate(*arguments: object) -> None:
    CliRunner().invoke(
        command, [str(argument) for argument in arguments], catch_exceptions=False, standalone_mode=False
    )


def test_a_run_beside_its_checkpoint(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(run, "--tasks", "perplexity", "--reference", checkpoint, "--output", out)
    assert sorted(path.name for path in out.iterdir()) == ["table.html", "table.json", "table.md"]
    table = json.loads((out / "table.json").read_text())
    perplexity, unigram = table["rows"]
    assert perplexity["n"] == 1 and perplexity["percent"] == pytest.approx(0, abs=1e-3)
    assert unigram["metric"] == "unigram_perplexity" and unigram["after"] < perplexity["after"]
    assert table["subject"]["path"] == str(run / "weights") and table["reference"]["path"] == str(checkpoint)


def test_a_test_dataset_of_its_own(run: Path, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    """The twin has the same documents in one dataset: those trained on first, then the others."""
    other, both = make_dataset(checkpoint, tmp_path / "other"), tmp_path / "both"
    lay_end_to_end([dataset, other], both)
    record = {"name": "run", "data": [{"prefix": str(dataset)}], "split": [1, 0, 0], "recipe": {"seq_len": 32}}
    (run / "run.json").write_text(json.dumps(record | {"test": [{"prefix": str(other)}]}))
    evaluate(run, "--tasks", "perplexity", "--output", tmp_path / "out")
    evaluate(run, "--tasks", "perplexity", "--data", both, "--split", "1,0,1", "--output", tmp_path / "twin")
    rows, twin = (json.loads((tmp_path / name / "table.json").read_text())["rows"] for name in ("out", "twin"))
    assert [(row["metric"], row["n"], row["after"]) for row in rows] == [
        (row["metric"], row["n"], row["after"]) for row in twin
    ]


def test_tensor_parallel_processes_measure_the_same(run: Path, tmp_path: Path) -> None:
    for tp in (1, 2):
        evaluate(run, "--tasks", "perplexity", "--output", tmp_path / f"tp{tp}", "--tp", tp)
    one, two = (json.loads((tmp_path / f"tp{tp}" / "table.json").read_text())["rows"][0]["after"] for tp in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)


def test_a_run_says_data_split_and_length_unless_told(run: Path, dataset: Path, checkpoint: Path) -> None:
    plan = make_plan(run, ["perplexity"])
    assert (plan.weights, plan.data, plan.split, plan.seq_len) == (run / "weights", [str(dataset)], [18, 1, 1], 32)
    plan = make_plan(run, ["perplexity"], ["other"], [1, 1, 1], run, 64)
    assert (plan.data, plan.split, plan.reference, plan.seq_len) == (["other"], [1, 1, 1], run / "weights", 64)
    assert make_plan(checkpoint, ["perplexity"], ["p"]).split == [969.0, 30.0, 1.0]


def refused(*arguments: object) -> str:
    with pytest.raises(UserError) as raised:
        evaluate(*arguments)
    return str(raised.value)


def test_perplexity_needs_text(checkpoint: Path, tmp_path: Path) -> None:
    assert refused(checkpoint, "--tasks", "perplexity", "--output", tmp_path / "out") == (
        f"the task perplexity needs held-out text, and {checkpoint} is no run that says which: give --data PREFIX"
    )


def test_a_task_file_that_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    assert refused(checkpoint, "--tasks", "tasks/none.yaml", "--output", tmp_path / "out") == (
        "the task file tasks/none.yaml is missing: write it, or take it out of the tasks"
    )


def test_an_unfinished_run(run: Path, tmp_path: Path) -> None:
    (run / "run.json").unlink()
    assert refused(run, "--tasks", "perplexity", "--output", tmp_path / "out") == (
        f"{run} has no run.json: this run is not finished; run finetune to its end first"
    )


def test_another_tokenizer(run: Path, dataset: Path, tmp_path: Path) -> None:
    with (run / "weights" / "tokenizer.model").open("ab") as file:  # an unknown field of the protobuf
        file.write(b"\xfa\x3f\x01x")
    said = refused(run, "--tasks", "perplexity", "--output", tmp_path / "out")
    assert said.startswith(f"{dataset} is a dataset tokenized by another tokenizer than the model's")
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_something_else(run: Path, checkpoint: Path) -> None:
    assert refused(run, "--tasks", "perplexity", "--output", checkpoint) == (
        f"--output {checkpoint} holds config.json, generation_config.json, manifest.json, model.safetensors and no"
        " table.json: it is no evaluation, and evaluate does not replace it: name another directory or remove it"
    )


def test_a_plan_without_tasks_or_with_a_damaged_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tasks names none: give perplexity, lm-eval task names or files"):
        make_plan(tmp_path, [])
    for content in ("{", "[1]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"run\.json is damaged .*: run finetune again"):
            make_plan(tmp_path, ["perplexity"])

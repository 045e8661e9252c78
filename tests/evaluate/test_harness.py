"""Our model in lm-eval against lm-eval's own class for transformers, on the same weights, tokenizer and tasks."""

import json
import random
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError
from llmpipe.evaluate.harness import HarnessModel, measures, run_tasks
from llmpipe.evaluate.table import Measure
from llmpipe.inference.forward import Engine
from tiny_llama import POSITIONS, TEXT


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> HarnessModel:
    return HarnessModel(Engine.open(checkpoint), open_tokenizer(checkpoint), POSITIONS)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=3, add_bos_token=True)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]  # type: ignore[arg-type]


def test_loglikelihood(ours: HarnessModel, theirs: HFLM) -> None:
    asked = requests(
        "loglikelihood",
        ("def add_argument(self", ", *args"),
        ("trailing space ", "goes along"),
        ("", "no context"),
        (TEXT[:900], " a context that is too long"),
        ("naïve 😀", " bytes ▁ fall back"),
    )
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3, rel=1e-4)
        assert mine[1] == other[1]


def test_rolling(ours: HarnessModel, theirs: HFLM) -> None:
    asked = requests("loglikelihood_rolling", ("short",), (TEXT[:1500],), (TEXT[2000:2600],))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-4)


def test_generation(ours: HarnessModel, theirs: HFLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both decode by SentencePiece: of a random model's broken UTF-8 `tokenizers` makes other characters."""
    decode = theirs.tok_decode
    monkeypatch.setattr(
        theirs, "tok_decode", lambda t, **kw: decode(t, **kw) if isinstance(t, int) else ours.text.decode(t)
    )
    for context in ("def add_argument(", TEXT[:700], "class Action"):
        (free,) = theirs.generate_until(
            requests("generate_until", (context, {"until": [], "max_gen_toks": 20})), disable_tqdm=True
        )
        stop = free[6:8]
        for until in ([], [stop], stop):
            asked = requests("generate_until", (context, {"until": until, "max_gen_toks": 20, "do_sample": False}))
            assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_text_never_becomes_control_tokens(ours: HarnessModel) -> None:
    ids = ours.tok_encode("<s>a</s>", add_special_tokens=False)
    assert not {1, 2} & set(ids) and ours.text.decode(ids) == "<s>a</s>"


def test_sampling_is_refused(ours: HarnessModel) -> None:
    with pytest.raises(UserError, match="generates greedily only"):
        ours.generate_until(requests("generate_until", ("a", {"do_sample": True})))


def test_more_new_tokens_than_the_model_reads(ours: HarnessModel) -> None:
    with pytest.raises(UserError, match="a task asks for 128 new tokens, but the model reads 128 in all"):
        ours.generate_until(requests("generate_until", ("a", {"max_gen_toks": 128})))


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which line follows: a multiple-choice task of local data."""
    folder = tmp_path_factory.mktemp("task")
    lines = [line for line in TEXT.splitlines() if line.strip()][:120]
    choose = random.Random(0)
    rows = [
        {"context": lines[i] + "\n", "choices": [*choose.sample(lines, 2), lines[i + 1]], "answer": 2}
        for i in range(0, 60, 3)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "next_line.yaml"
    path.write_text(f"""
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "test.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_local_multiple_choice_task(ours: HarnessModel, theirs: HFLM, task_file: Path, capfd) -> None:
    manager = TaskManager(include_defaults=False)
    results = simple_evaluate(theirs, tasks=[str(task_file)], task_manager=manager, log_samples=False)["results"]
    capfd.readouterr()
    found = {measure.metric: measure for measure in run_tasks(ours, [str(task_file)])}
    assert capfd.readouterr() == ("", "")  # no bars in a log
    for metric in ("acc", "acc_norm"):
        assert found[metric].value == results["next_line"][f"{metric},none"]
        assert found[metric].stderr == results["next_line"][f"{metric}_stderr,none"]
        assert found[metric].n == 20
    assert 0 < found["acc"].value < 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_failing_task(ours: HarnessModel, task_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(task_file.read_text().replace("test.jsonl", "absent.jsonl"))
    with pytest.raises(UserError, match=r"lm-eval failed in .*broken.yaml: .*absent.jsonl"):
        run_tasks(ours, [str(path)])


def test_a_group_has_the_samples_of_its_tasks() -> None:
    results = {
        "results": {
            "all": {"alias": "all", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "a": {"exact_match,strict": 1.0, "exact_match_stderr,strict": 0.0},
        },
        "n-samples": {"a": {"original": 9, "effective": 3}, "b": {"original": 4, "effective": 4}},
        "group_subtasks": {"all": ["some", "b"], "some": ["a"], "a": [], "b": []},
    }
    assert measures(results) == [
        Measure("all", "acc", 0.5, None, 7),
        Measure("a", "exact_match (strict)", 1.0, 0.0, 3),
    ]

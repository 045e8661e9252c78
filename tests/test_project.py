"""What the rules look up in a project's config files, and what a wrong reference is told."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.layout import Stages, parse_layers
from llmpipe.project import configs, inputs, options, outputs

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the shipped config/ in the current folder; nothing read before counts."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    for cached in (configs.model, configs.corpus, configs.run):
        cached.cache_clear()
    yield tmp_path / "config"
    for cached in (configs.model, configs.corpus, configs.run):
        cached.cache_clear()


def write_run(config: Path, **changed: str) -> None:
    """config/runs/mine.yaml."""
    keys = {"model": "llama2_7b", "data": "{text: 1.0}", "recipe": "llama2"} | changed
    (config / "runs/mine.yaml").write_text("\n".join(f"{key}: {value}" for key, value in keys.items()))


def test_project_and_tracking() -> None:
    found = configs.project({"runs": ["llama2_7b"], "tracking": {"uri": "http://host:5000", "experiment": "a b"}})
    assert found.runs == ["llama2_7b"]
    assert options.track_options(found) == "--uri http://host:5000 --experiment 'a b'"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"runs": ["llama2_7c"]}, "there is no config/runs/llama2_7c.yaml: did you mean 'llama2_7b'?"),
        ({"runz": []}, "config/config.yaml: unknown key runz: did you mean 'runs'?"),
        ({}, "config/config.yaml: the key runs is missing"),
    ],
)  # fmt: skip
def test_wrong_project(values: dict, told: str) -> None:
    with pytest.raises(UserError) as error:
        configs.project(values)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "lama2_7b"}, "but there is no config/models/lama2_7b.yaml: did you mean 'llama2_7b'?"),
        ({"recipe": "lama2"}, "names 'lama2', but there is no config/recipes/lama2.yaml: did you mean 'llama2'?"),
        ({"data": "{texts: 1}"}, "names 'texts', but there is no config/corpora/texts.yaml: did you mean 'text'?"),
    ],
)  # fmt: skip
def test_wrong_names_in_a_run(changed: dict[str, str], told: str, config: Path) -> None:
    write_run(config, **changed)
    with pytest.raises(UserError) as error:
        configs.run("mine")
    assert str(error.value).startswith("config/runs/mine.yaml names '")
    assert told in str(error.value)


def test_wrong_layout_names_its_file(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 8, tp: 3}")
    with pytest.raises(UserError, match=r"config/runs/mine\.yaml: layout: tp 3 x pp 1 .* does not make 8 processes"):
        configs.layout("mine")


def test_weights_from_the_hub_are_fetched_to_a_place_of_the_models_own(config: Path) -> None:
    (config / "models/mine.yaml").write_text("source: hf://org/name@v1")
    assert inputs.source("mine", lambda path: False) == "results/models/mine/source"
    assert inputs.hub_source("mine") == "hf://org/name@v1"
    with pytest.raises(UserError, match=r"models/llama2_7b\.yaml: nothing is fetched for the source weights/"):
        inputs.hub_source("llama2_7b")


def test_held_out_corpora_are_inputs_and_no_split_is_made(config: Path) -> None:
    for name in ("more", "held"):
        (config / f"corpora/{name}.yaml").write_text(f"files: [{name}.txt]")
    write_run(config, validation="{more: 1}", test="{held: 2}")
    corpora = "results/models/llama2_7b/corpora"
    assert outputs.dataset_files("mine")[::3] == [f"{corpora}/{name}.bin" for name in ("text", "more", "held")]
    assert options.finetune_options("mine").startswith(
        f"--data {corpora}/text=1 --validation {corpora}/more=1 --test {corpora}/held=2 --nodes"
    )
    assert configs.config_files("mine")[2:] == [f"config/corpora/{name}.yaml" for name in ("text", "more", "held")]


def test_a_held_out_corpus_has_a_file(config: Path) -> None:
    write_run(config, test="{gone: 1}")
    with pytest.raises(UserError, match=r"names 'gone', but there is no config/corpora/gone\.yaml"):
        configs.run("mine")


def test_files_and_options_of_a_run(config: Path) -> None:
    (config / "corpora/more.yaml").write_text("files: [more.txt]")
    write_run(config, data="{text: 2, more: 0.5}", split="[8, 1, 1]", layout="{gpus_per_node: 8, tp: 2, pp: 2}")
    corpora = "results/models/llama2_7b/corpora"
    assert outputs.rank_files("mine") == "results/models/llama2_7b/tp2-pp2"
    assert outputs.checkpoint("mine") == "results/models/llama2_7b/checkpoint"
    assert outputs.cards("mine") == [
        "results/models/llama2_7b/verify.json",
        "results/models/llama2_7b/tp2-pp2.verify.json",
    ]
    assert outputs.dataset_files("mine")[::3] == [f"{corpora}/text.bin", f"{corpora}/more.bin"]
    assert configs.recipe_file("mine") == "config/recipes/llama2.yaml"
    assert options.finetune_options("mine") == (
        f"--data {corpora}/text=2 --data {corpora}/more=0.5 --split 8,1,1"
        " --nodes 1 --gpus-per-node 8 --tp 2 --pp 2 --dp 2 --micro-batch 1 --device cuda"
        " --config-file config/runs/mine.yaml --config-file config/models/llama2_7b.yaml"
        " --config-file config/corpora/text.yaml --config-file config/corpora/more.yaml"
    )


@pytest.mark.parametrize("given", ["cp: 2", "vp: 2", "pp_schedule: gpipe", "data_parallel: plain"])
def test_every_axis_of_a_layout_reaches_training(given: str, config: Path) -> None:
    write_run(config, layout=f"{{gpus_per_node: 4, pp: 2, {given}}}")
    assert f" --{given.replace('_', '-').replace(':', '')} " in options.finetune_options("mine")


def test_uneven_stages_reach_rank_files_and_training(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 2, pp: 2, pp_layers: [15, 17]}")
    assert outputs.rank_files("mine") == "results/models/llama2_7b/tp1-pp2-layers15.17"
    assert " --pp-layers 15,17 " in options.finetune_options("mine")


def test_the_name_of_rank_files_says_how_they_are_made() -> None:
    for stages in (Stages(2), Stages(2, 2), Stages(2, layers=(15, 17)), Stages(2, 2, (1, 2, 3, 2))):
        words = options.stage_options(stages.name.removeprefix("pp")).split()
        told = dict(zip(words[::2], words[1::2], strict=True))
        assert Stages(int(told["--pp"]), int(told.get("--vp", 1)), parse_layers(told.get("--pp-layers"))) == stages


def test_virtual_stages_reach_rank_files_and_training(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 2, pp: 2, vp: 4, pp_schedule: zero-bubble}")
    assert outputs.rank_files("mine") == "results/models/llama2_7b/tp1-pp2-vp4"
    assert " --vp 4 --pp-schedule zero-bubble " in options.finetune_options("mine")


def test_a_schedule_that_cannot_be_is_refused_for_a_run(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 2, pp: 2, vp: 4, pp_schedule: gpipe}")
    with pytest.raises(UserError, match=r"runs/mine\.yaml: layout: pp_schedule gpipe has no virtual stages.* vp is 4"):
        configs.layout("mine")


def test_evaluation_takes_the_gpus_that_share_a_layer(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 8, tp: 2}", evaluate="[perplexity, hellaswag]")
    assert options.evaluate_options("mine") == "--tasks perplexity,hellaswag --device cuda --tp 2"
    assert options.evaluate_gpus("mine") == 2


def test_evaluation_on_the_cpu_is_one_process(config: Path) -> None:
    write_run(config, layout="{gpus_per_node: 4, tp: 2, device: cpu}")
    assert options.evaluate_options("mine") == "--tasks perplexity --device cpu --tp 1"
    assert options.evaluate_gpus("mine") == 0


def test_task_files_and_their_data_are_inputs(config: Path) -> None:
    write_run(config, evaluate="[perplexity, mine.yaml]")
    Path("mine.yaml").write_text("{task: mine, dataset_kwargs: {data_files: {test: [a.jsonl, b.jsonl]}}}")
    assert inputs.task_files("mine") == ["mine.yaml", "a.jsonl", "b.jsonl"]
    Path("mine.yaml").write_text("{task: mine, process_docs: !function utils.process}")
    assert inputs.task_files("mine") == ["mine.yaml"]
    Path("mine.yaml").unlink()
    with pytest.raises(UserError, match=r"mine\.yaml is missing: a run's `evaluate:` names it as an lm-eval task file"):
        inputs.task_files("mine")


def test_only_asked_for_files_are_read(config: Path) -> None:
    (config / "runs/broken.yaml").write_text("{{{")
    assert "broken" in configs.names("runs")
    assert configs.run("llama2_7b").recipe == "llama2"


def test_what_is_told_of_a_source_becomes_options_of_convert(config: Path) -> None:
    (config / "models/mine.yaml").write_text("source: megatron/run\ndialect: epf\nvocab: 32005\n")
    assert options.convert_options("mine") == "--source-dialect epf --vocab 32005"


def test_added_tokens_become_options_of_convert(config: Path) -> None:
    assert options.convert_options("llama2_7b") == "--shape llama2_7b"
    text = """source: weights/mine\nadded_tokens: ["<|im_start|>", "it's"]\nnew_rows: zeros\n"""
    (config / "models/mine.yaml").write_text(text)
    told = """--add-token '<|im_start|>' --add-token 'it'"'"'s' --new-rows zeros"""
    assert options.convert_options("mine") == told

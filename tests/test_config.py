"""Config files: what is read, and what a wrong one is told."""

from pathlib import Path

import pytest

from llmpipe.config import Corpus, Model, Project, Run, parse_data, parse_hub, parse_split
from llmpipe.errors import UserError
from llmpipe.recipe import Recipe
from llmpipe.yaml_file import load

RECIPE = "{seq_len: 128, global_batch: 16, steps: 300, lr: 1e-3%s}"


def read(kind: type, text: str, tmp_path: Path) -> object:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    return load(kind, path)


def refused(kind: type, text: str, tmp_path: Path) -> str:
    with pytest.raises(UserError) as error:
        read(kind, text, tmp_path)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_defaults_fill_in(tmp_path: Path) -> None:
    recipe = read(Recipe, RECIPE % ", schedule: {warmup: 0.1}", tmp_path)
    assert isinstance(recipe, Recipe)
    assert (recipe.lr, recipe.schedule.warmup, recipe.schedule.kind, recipe.betas) == (1e-3, 0.1, "cosine", [0.9, 0.95])


def test_off_is_a_word_and_merged_keys_are_no_second_ones(tmp_path: Path) -> None:
    """YAML 1.1 reads off as false."""
    text = "{<<: {steps: 7, recompute: full}, seq_len: 8, global_batch: 2, lr: 1, recompute: off}"
    recipe = read(Recipe, text, tmp_path)
    assert isinstance(recipe, Recipe) and (recipe.recompute, recipe.steps) == ("off", 7)


def test_run_with_its_layout(tmp_path: Path) -> None:
    run = read(Run, "{model: m, data: {a: 1, b: 0.5}, recipe: r, layout: {tp: 2, device: cpu}}", tmp_path)
    assert isinstance(run, Run)
    assert (run.data, run.layout.tp, run.layout.device, run.split) == ({"a": 1.0, "b": 0.5}, 2, "cpu", [969, 30, 1])


def test_a_run_with_held_out_corpora_of_its_own(tmp_path: Path) -> None:
    run = read(Run, "{model: m, data: {a: 1}, validation: {b: 2}, test: {c: 1, b: 1}, recipe: r}", tmp_path)
    assert isinstance(run, Run)
    assert (run.corpora, run.validation, run.test) == (["a", "b", "c"], {"b": 2.0}, {"c": 1.0, "b": 1.0})
    with pytest.raises(UserError, match="a is held out, for validation or test, and trained on as well: take it out"):
        read(Run, "{model: m, data: {a: 1}, test: {a: 1}, recipe: r}", tmp_path)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (Recipe, RECIPE % ", warmupp: 3", "given.yaml: unknown key warmupp: known: apex, batch_ramp, betas, "),
        (Recipe, RECIPE % ", wait_decay: 3", "given.yaml: unknown key wait_decay: did you mean 'weight_decay'?"),
        (Recipe, RECIPE % ", schedule: {warm: 3}", "unknown key schedule.warm: did you mean 'warmup'?"),
        (Recipe, "{steps: 3}", "given.yaml: the key seq_len is missing"),
        (Recipe, "{steps: 3, seq_len: 1.5, lr: 1, global_batch: 1}", "seq_len is 1.5, but has to be a whole number"),
        (Recipe, "{steps: true, seq_len: 1, lr: 1, global_batch: 1}", "steps is True, but has to be a whole number"),
        (Recipe, RECIPE % ", precision: bf61", "precision is 'bf61': did you mean 'bf16'?"),
        (Recipe, RECIPE % ", weight_decay: much", "weight_decay is 'much', but has to be a number"),
        (Recipe, RECIPE % ", betas: 0.9", "betas is 0.9, but has to be a list"),
        (Recipe, RECIPE % ", isolate_documents: 'no'", "isolate_documents is 'no', but has to be true or false"),
        (Recipe, RECIPE % ", save_every: 0", "given.yaml: save_every is 0, but has to be 1 or more"),
        (
            Recipe,
            RECIPE % ", seed: -1",
            "seed is -1, but has to be from 0 to 4294967295, as NumPy's generator takes it",
        ),
        (Recipe, RECIPE % ", steps: 5", "given.yaml: the key steps stands there twice, line 1 on: leave one out"),
        (Recipe, RECIPE % ", spike: {window: 3, window: 4}", "given.yaml: the key window stands there twice"),
        (Recipe, RECIPE % ", recompute: true", "recompute is True: known: full, off, selective"),
        (Recipe, RECIPE % ", clip: 0", "given.yaml: clip is 0.0, but has to be above 0"),
        (Recipe, RECIPE % ", eps: -1", "given.yaml: eps is -1.0, but has to be above 0"),
        (Recipe, RECIPE % ", clip: .inf", "given.yaml: clip is inf, but has to be above 0"),
        (Recipe, RECIPE % ", weight_decay: -1", "given.yaml: weight_decay is -1.0, but has to be 0 or more"),
        (Recipe, RECIPE % ", schedule: {warmup: -1}", "schedule.warmup is -1.0, but has to be 0 or more"),
        (Recipe, RECIPE % ", schedule: {min_lr: 1}", "schedule.min_lr is 1.0, but has to be from 0 to lr, 0.001"),
        (Recipe, RECIPE % ", betas: [0.9]", "betas is [0.9], but has to be two numbers from 0 to below 1"),
        (Recipe, "- 1", "given.yaml: the file is [1], but has to be a mapping of keys"),
        (Recipe, "", "given.yaml: the file is None, but has to be a mapping of keys"),
        (Recipe, "{a: ", "given.yaml is not YAML: "),
        (Model, "{source: 3}", "source is 3, but has to be a text"),
        (Model, "{source: hf://a/b/c}", "hf://a/b/c names no repository of the Hugging Face hub: hf://ORG/NAME or hf"),
        (Model, "{sauce: a}", "unknown key sauce: did you mean 'source'?"),
        (Model, "{source: a, added_tokens: ['']}", "added_tokens holds '': name tokens as <|im_start|>"),
        (Model, "{source: a, new_rows: ones}", "new_rows is 'ones'"),
        (Corpus, "{files: a.txt}", "files is 'a.txt', but has to be a list"),
        (Corpus, "{files: [a.txt, 3]}", "files[1] is 3, but has to be a text"),
        (Run, "{model: m, data: {a: x}, recipe: r}", "data.a is 'x', but has to be a number"),
        (Run, "{model: m, data: {}, recipe: r, layout: {td: 2}}", "unknown key layout.td: did you mean 'tp'?"),
        (Run, "{model: m, data: {}, recipe: r, layout: {tp: 0}}", "layout: tp is 0, but has to be 1 or more"),
        (Run, "{model: m, data: {}, recipe: r, layout: {device: gpu}}", "layout.device is 'gpu': "),
        (Project, "{runs: [a], tracking: {url: b}}", "unknown key tracking.url: did you mean 'uri'?"),
    ],
)
def test_wrong_files(kind: type, text: str, told: str, tmp_path: Path) -> None:
    assert told in refused(kind, text, tmp_path)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").touch()
    with pytest.raises(UserError, match=r"stf\.yaml is missing: did you mean 'sft'\?"):
        load(Recipe, tmp_path / "stf.yaml")
    with pytest.raises(UserError, match=r"run\.yaml is missing: write it"):
        load(Run, tmp_path / "empty" / "run.yaml")


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("hf://meta-llama/Llama-2-7b-hf", ("meta-llama/Llama-2-7b-hf", None)),
        ("hf://01-ai/Yi-6B@main", ("01-ai/Yi-6B", "main")),
        ("hf://Qwen/Qwen2.5-0.5B@refs/pr/3", ("Qwen/Qwen2.5-0.5B", "refs/pr/3")),
    ],
)
def test_names_on_the_hub(given: str, parsed: tuple[str, str | None]) -> None:
    assert parse_hub(given) == parsed


@pytest.mark.parametrize("given", ["hf://gpt2", "hf://a/b@", "hf://a/b c", "hf:///a/b", "https://a/b", "hf://../b"])
def test_no_names_on_the_hub(given: str) -> None:
    with pytest.raises(UserError, match="names no repository of the Hugging Face hub"):
        parse_hub(given)


def test_options_of_data_and_split() -> None:
    assert parse_data(("a", "b/c=0.5")) == {"a": 1.0, "b/c": 0.5}
    assert parse_split("969,30,1") == [969, 30, 1]
    with pytest.raises(UserError, match=r"--data a=x: the weight 'x' has to be a number, as in PREFIX=0\.5"):
        parse_data(("a=x",))
    with pytest.raises(UserError, match="--data a=0: the weight has to be above 0"):
        parse_data(("a=0",))
    for wrong in ("1,2", "a,b,c", "0,0,0", "-1,1,1"):
        with pytest.raises(UserError, match=f"--split {wrong}: three shares for train, validation and test"):
            parse_split(wrong)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"a\.yaml is not YAML: "):
        load(Recipe, tmp_path / "a.yaml")


@pytest.mark.parametrize("given", ["inf,0,1", "1,0,nan"])
def test_shares_are_finite(given: str) -> None:
    with pytest.raises(UserError, match=f"--split {given}: three shares"):
        parse_split(given)


def test_weights_are_finite() -> None:
    with pytest.raises(UserError, match="--data a=inf: the weight has to be above 0"):
        parse_data(("a=inf",))

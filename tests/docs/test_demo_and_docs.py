"""The pipeline as a user has it: the demo in a folder of its own, shortened, killed in the middle and started again;
then every command of docs/, run in it."""

import json
import os
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import HOWTO, REPOSITORY, blocks, environment, run_block, succeeded

from hub_server import Hub, files_of, serving
from llmpipe.cli import COMMANDS, group

PAGES = sorted(page for page in (REPOSITORY / "docs").glob("*.md") if page.stem != "slurm")  # that one is a how-to page
LINES = {line for page in PAGES for block in blocks(page) if not block.kind for line in block.text.splitlines()}
"""What the pages run."""
STEPS, SAVE_EVERY = 16, 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demo of few steps, whose snakemake and all its processes were killed while it trained.

    Of tiny_falcon there is the training alone: `make demo` makes the rest of it.
    """
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("results", "logs", "data", "weights", "mlruns", "mlflow.db", ".*")
    shutil.copytree(REPOSITORY / "demo", root / "demo", ignore=ignored, symlinks=True)
    for name in ("workflow", "slurm"):
        (root / name).symlink_to(REPOSITORY / name)
    folder = root / "demo"
    for recipe in (folder / "config/recipes").glob("*.yaml"):
        shortened = re.sub(r"(?m)^steps: .*", f"steps: {STEPS}", recipe.read_text())
        recipe.write_text(re.sub(r"(?m)^save_every: .*", f"save_every: {SAVE_EVERY}", shortened))
    for name in ("tiny_llama", "tiny_falcon"):
        run = folder / "config/runs" / f"{name}.yaml"
        run.write_text(re.sub(r"(?m)^split: .*", "split: [990, 5, 5]", run.read_text()))  # less to evaluate
    config = folder / "config/config.yaml"
    config.write_text(config.read_text().replace("runs: [tiny_llama, tiny_falcon]", "runs: [tiny_llama]"))
    (folder / "scratch").mkdir()
    kill_while_training(folder)
    rest = "all results/runs/tiny_falcon/run.json"
    succeeded(f"snakemake --unlock && snakemake -c all --rerun-incomplete {rest}", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def hub(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A hub where the demo's checkpoint stands under the names of the examples: tests ask nobody else."""
    files = files_of(demo / "results/models/tiny_llama/checkpoint")
    with serving(Hub(files, repositories=("meta-llama/Llama-2-7b-hf",))) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        yield


def kill_while_training(folder: Path) -> None:
    """Start the pipeline, and kill -9 every process of it after the first checkpoint."""
    started = subprocess.Popen(
        ["snakemake", "-c", "all"], cwd=folder, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    live = folder / "results/runs/tiny_llama/live.jsonl"
    for _ in range(3000):
        if live.exists() and len(live.read_text().splitlines()) > SAVE_EVERY:
            break
        assert started.poll() is None, "the pipeline ended before it trained"
        time.sleep(0.1)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (live.parent / "run.json").exists()


def test_killed_and_started_again_it_exports_what_an_undisturbed_run_does(demo: Path) -> None:
    command = logged_command(demo / "logs/finetune/tiny_llama.log")
    by_hand = command.replace("results/runs/tiny_llama", "scratch/undisturbed").replace("logs/", "scratch/logs/")
    succeeded(f"{by_hand} && llmpipe export scratch/undisturbed --output scratch/undisturbed_export", demo)
    ours, expected = (
        (demo / folder / "model.safetensors").read_bytes()
        for folder in ("results/runs/tiny_llama/export", "scratch/undisturbed_export")
    )
    assert ours == expected
    lines = (demo / "results/runs/tiny_llama/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert "resumed after step" in (demo / "results/runs/tiny_llama/log.txt").read_text()


def logged_command(log: Path) -> str:
    """The command that a rule ran, as the first line of its log has it."""
    return next(line.split("$ ", 1)[1] for line in log.read_text().splitlines() if "$ llmpipe" in line)


def test_every_stage_logged_a_command_that_can_be_copied(demo: Path) -> None:
    stages = ("convert", "verify", "tokenize", "shard", "finetune", "evaluate", "export", "track")
    for stage in stages:
        for log in (demo / "logs" / stage).glob("*.log"):
            assert logged_command(log).startswith(f"llmpipe {stage} ")


def test_a_second_run_does_nothing(demo: Path) -> None:
    assert "Nothing to be done" in succeeded("snakemake -c all", demo)


def test_transformers_opens_the_export(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export = demo / "results/runs/tiny_llama/export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    logits = model(**tokenizer("import os", return_tensors="pt")).logits
    assert logits.shape[-1] == model.config.vocab_size == 1500
    assert logits.isfinite().all()


def test_the_report_holds_curve_card_and_table(demo: Path) -> None:
    succeeded("snakemake -c 1 --report scratch/report.html", demo)
    report = (demo / "scratch/report.html").read_text()
    for name in ("loss.svg", "verify.html", "tp2-pp2.verify.html", "table.html"):
        assert name in report


def test_training_learns(demo: Path) -> None:
    table = {
        (row["task"], row["metric"]): row
        for row in json.loads((demo / "results/runs/tiny_llama/evaluate/table.json").read_text())["rows"]
    }
    perplexity = table["perplexity", "perplexity"]
    assert perplexity["after"] < 0.6 * perplexity["before"]
    assert ("next_line", "acc") in table


def test_chats_of_gsm8ks_form_are_masked_packed_and_trained(demo: Path) -> None:
    """The user brings the file; here its rows are made."""
    file = demo / "data/gsm8k/train.jsonl"
    file.parent.mkdir(parents=True)
    numbers = [(number, 7 * number % 10 + 1) for number in range(120)]
    rows = [
        {"question": f"Ann has {a} eggs and buys {b}. How many has she?", "answer": f"{a}+{b} = {a + b}\n#### {a + b}"}
        for a, b in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = (block for block in blocks(REPOSITORY / "docs/chat.md") if block.kind == "gsm8k")
    shown = succeeded(block.text, demo)
    lines = (demo / "results/runs/tiny_llama_gsm8k/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]
    assert f"\n<s>[INST] {rows[0]['question']} [/INST]⟦ {rows[0]['answer']} </s>⟧\n" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_each_commands_help_works(name: str, demo: Path) -> None:
    shown = CliRunner().invoke(group, [name, "--help"]).output
    example = textwrap.dedent(shown.split("Example:\n")[1].split("\n\n")[0])
    if example not in LINES:
        succeeded(example, demo)


# docs/demo.md takes the same stages as the other pages, one after the other by hand.
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] * (page.stem == "demo")) for page in PAGES],
    ids=lambda page: page.stem,
)
def test_the_commands_of_docs_work(page: Path, demo: Path) -> None:
    found = blocks(page)
    for block in found:
        run_block(block, demo)
    assert found or page.stem in ("design", "differences", "formats", "layouts", "recipes")


def test_the_commands_of_the_first_run_work(demo: Path) -> None:
    for block in blocks(HOWTO / "first-run.md"):
        run_block(block, demo.parent)

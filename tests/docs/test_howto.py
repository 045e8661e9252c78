"""The how-to pages: each command is run, on a tiny model in files of the shipped names; a GPU's is planned."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import HOWTO, REPOSITORY, Block, blocks, run_block, succeeded, write_corpus
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.cli import group

# Megatron's checkpoints as their forks have them, for those who come from there.
FORKS = {
    "coming-from-megatron-lm": ("my-megatron", "--to megatron --dialect mcore --tp 2 --pp 2"),
    "coming-from-megatron-llm": ("my-megatron", "--to megatron --dialect epf --tp 2"),
    "coming-from-megatron-llama": ("my-megatron", "--to megatron --dialect ali --tp 2"),
    "coming-from-easylm": ("my-easylm", "--to easylm"),
}


def repository(root: Path) -> Path:
    """What of the repository the pages need: the shipped config files, the workflow, the demo's inputs."""
    shutil.copytree(REPOSITORY / "config", root / "config")
    for name in ("workflow", "slurm"):
        (root / name).symlink_to(REPOSITORY / name)
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and the demo's Llama as Meta publishes one."""
    folder = tmp_path_factory.mktemp("inputs")
    write_corpus(folder / "corpus.jsonl")
    succeeded(f"python {REPOSITORY}/demo/make_weights.py corpus.jsonl llama", folder)
    return folder


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config files as they are shipped, and something where they point: enough for a dry run."""
    root = repository(tmp_path_factory.mktemp("shipped"))
    for size in ("7b", "13b", "70b"):
        (root / f"weights/llama-2-{size}").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "data/corpus.jsonl").write_text('{"text": "one"}\n')
    return root


@pytest.fixture(scope="module")
def tiny(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same files for a tiny Llama on the CPU."""
    root = repository(tmp_path_factory.mktemp("tiny"))
    (root / "data").mkdir()
    (root / "data/corpus.jsonl").symlink_to(inputs / "corpus.jsonl")
    (root / "weights").mkdir()
    for size in ("7b", "13b"):
        (root / f"weights/llama-2-{size}").symlink_to(inputs / "llama")
        edit(root / f"config/models/llama2_{size}.yaml", shape=None)
        edit(root / f"config/runs/llama2_{size}.yaml", gpus_per_node=2, device="cpu", split=[90, 5, 5])
    for recipe in ("llama2", "sft"):
        edit(root / f"config/recipes/{recipe}.yaml", seq_len=64, global_batch=8, steps=4, save_every=2, eval_every=2)
    return root


def edit(file: Path, **values: object) -> None:
    """Other values of keys, in the lines that they have; None takes a line away."""
    text = file.read_text()
    for key, value in values.items():
        line = "" if value is None else rf"\g<1>{key}: {value}\n"
        text, count = re.subn(rf"(?m)^( *){key}: .*\n", line, text)
        assert count == 1, (file, key)
    file.write_text(text)


@pytest.mark.slow
def test_seven_billion_parameters_on_one_gpu_are_here_a_few_on_the_cpu(tiny: Path) -> None:
    *prepared, train = blocks(HOWTO / "llama2-7b-one-gpu.md")
    for block in prepared:
        run_block(block, tiny)
    assert train.kind == "gpu"
    succeeded(train.text, tiny)
    assert (tiny / "results/runs/one_gpu/export/README.md").exists()


@pytest.mark.slow
def test_eight_gpus_are_here_a_few_processes(tiny: Path) -> None:
    for block in blocks(HOWTO / "eight-gpus.md"):
        succeeded(block.text, tiny)
    made = ("llama2_7b/export/README.md", "a/run.json", "b/run.json")
    assert all((tiny / "results/runs" / file).exists() for file in made)


@pytest.mark.parametrize("page", ["own-corpus", "own-chats"])
def test_own_texts_and_chats_become_tokens(page: str, tiny: Path) -> None:
    for block in blocks(HOWTO / f"{page}.md"):
        run_block(block, tiny)


@pytest.mark.parametrize(("page", "gpus"), [("llama2-7b-one-gpu", {1}), ("eight-gpus", {4, 8})])
def test_as_shipped_they_ask_for_the_gpus_of_the_title(page: str, gpus: set[int], shipped: Path) -> None:
    asked = set()
    for block in blocks(HOWTO / f"{page}.md"):
        if "llmpipe" not in block.text:
            shown = succeeded(block.planned, shipped)
            asked |= {int(gpu) for gpu in re.findall(r"rule finetune:(?:\n .*)*? gpu=(\d+)", shown)}
    assert asked == gpus


def test_the_readme_plans_the_shipped_run(shipped: Path) -> None:
    (block,) = blocks(REPOSITORY / "README.md")
    assert "rule finetune:" in run_block(block, shipped)


def test_a_cluster_is_asked_for_what_the_page_says(shipped: Path) -> None:
    (plan, *others) = blocks(REPOSITORY / "docs/slurm.md")
    for block in others:
        run_block(block, shipped)
    for line in re.findall(r"(?m)^\| `(llama2_\w+)` \|(.*)\|$", (REPOSITORY / "docs/slurm.md").read_text()):
        name, numbers = line
        shown = run_block(Block("gpu", plan.text.replace("llama2_7b", name)), shipped)
        memory = dict(re.findall(r"rule (\w+):(?:\n .*)*? mem_mb=(\d+)", shown))
        asked = [round(int(memory[rule]) / 1000) for rule in ("verify", "verify_shards", "finetune")]
        assert asked == [int(number) for number in numbers.split("|")]


@pytest.fixture(scope="module")
def many_heads(inputs: Path) -> Path:
    """A Llama without grouped queries, which not all forks have."""
    folder = inputs / "many_heads"
    config = LlamaConfig(
        vocab_size=1500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(inputs / "llama/tokenizer.model", folder)
    return folder


@pytest.mark.parametrize("page", FORKS)
def test_those_who_come_from_elsewhere_bring_their_weights(page: str, many_heads: Path, tiny: Path) -> None:
    name, written = FORKS[page]
    shutil.rmtree(tiny / "weights" / name, ignore_errors=True)
    command = f"convert {many_heads} --output {tiny}/weights/{name} {written}"
    made = CliRunner().invoke(group, command.split(), catch_exceptions=False)
    assert made.exit_code == 0, made.output
    for block in blocks(HOWTO / f"{page}.md"):
        run_block(block, tiny)

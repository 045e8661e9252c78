"""Memory and time of jobs: of models whose sizes Meta published, of layouts, of bytes on the disk."""

import json
import os
import shutil
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from llmpipe.project import configs, needs

ROOT = Path(__file__).parents[1]
# As transformers counts them; a layer of Llama 2 70B: q and o, k and v of 8 heads, the MLP's three, two norms.
PARAMETERS_7B, PARAMETERS_70B = 6_738_415_616, 68_976_648_192
LAYER_7B = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
LAYER_70B = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shipped config/ in the current folder."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    cached = (configs.model, configs.corpus, configs.run)
    for each in cached:
        each.cache_clear()
    yield tmp_path / "config"
    for each in cached:
        each.cache_clear()


def megabytes(num_bytes: float) -> int:
    return ceil(num_bytes / 1e6)


def make(path: Path, num_bytes: int) -> None:
    """A file of that size, without bytes on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, num_bytes)


def test_a_check_takes_the_whole_model_or_its_largest_block() -> None:
    assert needs.verify_memory("llama2_7b") == 4000 + megabytes(12 * LAYER_7B)
    assert needs.whole_memory("llama2_7b") == needs.export_memory("llama2_7b") == 4000 + megabytes(5.2 * PARAMETERS_7B)
    # In fp32 a 70B is more than most nodes have.
    assert needs.whole_memory("llama2_70b") == needs.verify_memory("llama2_70b") == 4000 + megabytes(12 * LAYER_70B)


def test_the_embedding_may_be_the_largest_block(config: Path) -> None:
    assert needs.verify_memory("llama3_2_1b") == 4000 + megabytes(12 * 128_256 * 2048)


def test_a_training_holds_its_checkpoint_twice() -> None:
    """Eight ranks share all of a 7B, and one publishes it, in bf16; of a 70B each of 32 ranks has a part, and publishes
    it, and eight are on a node."""
    whole, part = 2 * PARAMETERS_7B, 2 * PARAMETERS_70B / 32
    assert needs.finetune_memory("llama2_7b") == 8 * (8000 + megabytes(24 * PARAMETERS_7B / 8)) + megabytes(whole)
    assert needs.finetune_memory("llama2_70b") == 8 * (8000 + megabytes(24 * PARAMETERS_70B / 32)) + megabytes(8 * part)


def test_copies_of_the_parameters_and_bf16_count(config: Path) -> None:
    path, recipe = config / "runs/llama2_7b.yaml", config / "recipes/llama2.yaml"
    path.write_text(path.read_text().replace("data_parallel: full ", "data_parallel: plain "))
    recipe.write_text(recipe.read_text().replace("parameters: fp32", "parameters: bf16"))
    published = megabytes(2 * PARAMETERS_7B)
    assert needs.finetune_memory("llama2_7b") == 8 * (8000 + megabytes(12 * PARAMETERS_7B)) + published


def test_an_evaluation_takes_its_gpus_or_the_model() -> None:
    assert needs.evaluate_memory("llama2_70b") == 4000 + 8 * 8000
    path = Path("config/runs/llama2_7b.yaml")
    path.write_text(path.read_text().replace("device: cuda", "device: cpu"))
    assert needs.evaluate_memory("llama2_7b") == 4000 + megabytes(5.2 * PARAMETERS_7B)


def test_an_evaluation_lasts_as_long_as_its_text_and_tasks(config: Path) -> None:
    """Two models that are read and run; most of the test split's tokens are read twice."""
    path = config / "runs/llama2_7b.yaml"
    tp2 = path.read_text().replace("tp: 1", "tp: 2").replace("split: [969, 30, 1]", "split: [98, 1, 1]")
    path.write_text(tp2)
    reading = 30 + ceil(megabytes(2 * 4 * PARAMETERS_7B) / 3000)
    assert needs.evaluate_minutes("llama2_7b") == reading  # no data is there yet
    make(Path("results/models/llama2_7b/corpora/text.bin"), 1_000_000_000)
    flop = 2 * 2 * PARAMETERS_7B * 2 * 5_000_000  # 1 % of 500 million tokens
    assert needs.evaluate_minutes("llama2_7b") == reading + ceil(flop / (2 * 5e13) / 60)
    configs.run.cache_clear()
    path.write_text(tp2.replace("evaluate: [perplexity]", "evaluate: [hellaswag, tasks/own.yaml]"))
    assert needs.evaluate_minutes("llama2_7b") == reading + ceil(2 * 2 * PARAMETERS_7B * 2 * 50e6 / (2 * 5e13) / 60)
    configs.run.cache_clear()
    path.write_text(tp2.replace("tp: 2", "tp: 8").replace("evaluate: [perplexity]", "evaluate: [hellaswag]"))
    assert needs.evaluate_minutes("llama2_7b") == 480  # what the task takes is not known: no less
    configs.run.cache_clear()
    path.write_text(tp2.replace("device: cuda", "device: cpu"))
    assert needs.evaluate_minutes("llama2_7b") == 24 * 60


def test_an_evaluation_on_text_of_its_own_reads_all_of_it(config: Path) -> None:
    path = config / "runs/llama2_7b.yaml"
    path.write_text(path.read_text() + "test: {held_out: 1}\n")
    shutil.copy(config / "corpora/text.yaml", config / "corpora/held_out.yaml")
    make(Path("results/models/llama2_7b/corpora/text.bin"), 1_000_000_000)
    before = needs.evaluate_minutes("llama2_7b")
    make(Path("results/models/llama2_7b/corpora/held_out.bin"), 10_000_000)
    assert needs.evaluate_minutes("llama2_7b") == before + ceil(2 * 2 * PARAMETERS_7B * 2 * 5e6 / 5e13 / 60)


def test_a_report_takes_the_index_of_its_data() -> None:
    assert (needs.report_memory("llama2_7b"), needs.report_minutes("llama2_7b")) == (4000, 30)
    make(Path("results/models/llama2_7b/corpora/text.bin"), 90_000_000_000)
    make(Path("results/models/llama2_7b/corpora/text.idx"), 2_000_000_000)
    assert (needs.report_memory("llama2_7b"), needs.report_minutes("llama2_7b")) == (10_000, 30 + 31)


def test_time_goes_by_bytes(config: Path) -> None:
    assert needs.model_minutes("llama2_7b") == 30 + ceil(megabytes(4 * PARAMETERS_7B) / 3000)
    make(Path("weights/llama-2-7b/consolidated.00.pth"), 90_000_000_000)
    make(Path("weights/llama-2-7b/params.json"), 1)
    assert needs.convert_minutes("llama2_7b") == 30 + 31  # its source is larger than fp32
    corpus = config / "corpora/text.yaml"
    corpus.write_text(
        corpus.read_text().replace("[data/corpus.jsonl]", "[data/*.jsonl, data/more]").replace("parts: 1 ", "parts: 4 ")
    )
    assert needs.tokenize_minutes("text") == 30  # nothing is there yet
    configs.corpus.cache_clear()
    make(Path("data/a.jsonl"), 12_000_000_000)
    make(Path("data/more/deep/b.jsonl"), 36_000_000_000)
    assert needs.tokenize_minutes("text") == 30 + 50  # a quarter of 48 GB, 240 MB a minute
    assert needs.merge_minutes("text") == 30 + 16


def test_a_model_of_unknown_sizes_is_known_once_it_is_converted(config: Path) -> None:
    (config / "models/mine.yaml").write_text("source: hf://org/name@main\n")
    make(Path("results/models/mine/source/model.safetensors"), 3_000_000_001)
    assert needs.convert_minutes("mine") == 32
    assert (needs.verify_memory("mine"), needs.model_minutes("mine")) == (4000, 30)
    sizes = LlamaConfig(
        vocab_size=1000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32
    )
    told = sizes.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    make(Path("results/models/mine/checkpoint/config.json"), 0)
    Path("results/models/mine/checkpoint/config.json").write_text(json.dumps(told))
    assert needs.verify_memory("mine") == 4000 + megabytes(12 * LAYER_7B)

"""docs/howto/adding-a-family.md, followed in a copy of the repository: a table adds a family, and it works."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from commands import HOWTO, REPOSITORY, blocks, run_block, succeeded, write_corpus
from transformers import SeedOssForCausalLM

import llmpipe.helpers

# An editable installation looks up its own files first: here the copy's count.
SITE = """
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
sys.path.insert(0, {src!r})
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's sources, tests and config files, and what `make demo` leaves of text and weights."""
    for name in ("src", "tests", "config", "workflow"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=ignored)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    (tmp_path / "src/llmpipe" / Path(llmpipe.helpers.__file__).name).symlink_to(llmpipe.helpers.__file__)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE.format(src=str(tmp_path / "src")))
    shutil.copytree(REPOSITORY / "demo/config", tmp_path / "demo/config")
    corpus = tmp_path / "demo/data/tiny_llama.jsonl"
    write_corpus(corpus)
    succeeded(f"python {REPOSITORY}/demo/make_weights.py {corpus} demo/weights/tiny_llama", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_family_added_by_the_page_is_converted_verified_trained_and_exported(copy: Path) -> None:
    where = {"PYTHONPATH": str(copy / "site")}
    for block in blocks(HOWTO / "adding-a-family.md"):
        run_block(block, copy, **where)
    for card in ("verify.json", "tp2-pp1.verify.json"):
        assert json.loads((copy / "seed" / card).read_text())["verdict"] == "pass"
    assert loss(copy / "seed/export") < 0.95 * loss(copy / "weights/tiny_seed_oss")


def loss(model: Path) -> float:
    """transformers' own, of a text that is like the corpus."""
    made = SeedOssForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    tokens = torch.tensor([tokenizer.encode(Path(__file__).read_text())[:200]])
    return made(tokens, labels=tokens).loss.item()

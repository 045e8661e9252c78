"""Every stage from text to an exported model, where the model has a tokenizer.json alone."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from json_tokenizers import SPECIAL, save
from llmpipe.checkpoint.convert import convert, shard
from llmpipe.config import Corpus
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.describe import describe, first_documents
from llmpipe.data.tokenize import tokenize
from llmpipe.errors import UserError
from llmpipe.evaluate.evaluate import run as evaluate
from llmpipe.evaluate.plan import make_plan
from llmpipe.export.export import export
from llmpipe.layout import Layout, Stages
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight

BOS, EOS = SPECIAL["llama3"][:2]
TEXTS = [f"{BOS} written out, and {EOS}", *(text[:400] for text in inspect.getsource(json).split("\n\n")[:19])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = save("llama3", folder / "source")
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    convert(folder / "source", folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def dataset(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    tokenize(Corpus(files=[str(folder / "c.jsonl")]), checkpoint, folder / "corpus", 1)
    return folder / "corpus"


def test_tokens_are_the_librarys_with_its_rules(checkpoint: Path, dataset: Path) -> None:
    library, reader = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), Reader(dataset)
    eos = library.token_to_id(EOS)
    found = [reader.read(number).tolist() for number in range(reader.num_documents)]
    assert found[1:] == [[*library.encode(text).ids, eos] for text in TEXTS[1:]]  # BOS is its post-processor's
    assert library.decode(found[0]) == TEXTS[0] and found[0].count(eos) == 1, "written out, it is text"


def test_inspect(checkpoint: Path, dataset: Path) -> None:
    text = describe(dataset)
    assert f"  tokenizer   {checkpoint}/tokenizer.json, " in text and "  BOS         before each document" in text
    assert first_documents(dataset, checkpoint, 1).splitlines()[1] == TEXTS[0]


def job(model: Path, dataset: Path) -> Job:
    layout = Layout(device="cpu", gpus_per_node=1).resolved()
    recipe = Recipe(seq_len=16, global_batch=2, steps=1, lr=1e-3, precision="fp32")
    return Job(recipe=recipe, layout=layout, model=str(model), data={str(dataset): 1.0}, split=[8, 1, 1], output="out")


def test_training_takes_its_own_tokenizer_and_no_other(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "rank_files", 1, Stages(1))
    preflight(job(tmp_path / "rank_files", dataset))
    path = tmp_path / "rank_files" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=f"{dataset} is a dataset tokenized by another tokenizer than the model's: it"):
        preflight(job(tmp_path / "rank_files", dataset))


def test_evaluate_and_export(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    shard(checkpoint, tmp_path / "run" / "weights", 2, Stages(1))
    record = {
        "name": "run", "steps": 1, "tokens": 1, "split": [8, 1, 1], "recipe": {"seq_len": 512},
        "data": [{"prefix": str(dataset), "weight": 1.0, "digest": "abc"}],
        "model": {"path": "models/m", "checkpoint_digest": "0123"},
    }  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    library = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    documents = [[*library.encode(text).ids, library.token_to_id(EOS)] for text in TEXTS[18:]]
    evaluate(make_plan(tmp_path / "run", ["perplexity"]), tmp_path / "evaluated", "cpu", 1)
    found = json.loads((tmp_path / "evaluated" / "table.json").read_text())["rows"][0]["after"]
    assert found == pytest.approx(perplexity(checkpoint, documents), rel=1e-4)
    export(tmp_path / "run", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a") == library.encode("a").ids
    checks = {row["name"]: row for row in json.loads((tmp_path / "out" / "check.json").read_text())["checks"]}
    assert checks["prompts continued differently"]["value"] == 0


@torch.no_grad()
def perplexity(checkpoint: Path, documents: list[list[int]]) -> float:
    """transformers', of each token but the first."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    losses = []
    for document in documents:
        ids = torch.tensor(document)
        losses.append(torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    return torch.cat(losses).mean().exp().item()

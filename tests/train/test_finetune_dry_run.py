"""What a dry run tells: layout, batch, memory, and what the first step reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chats import ANSWERS, make_chats
from click.testing import CliRunner
from jobs import RECIPE, make_job

from finetune_command import finetune_arguments
from llmpipe.cli import group
from llmpipe.data.batches.held_out import heldout
from llmpipe.errors import UserError
from llmpipe.train.dry_run import told
from llmpipe.train.preflight import preflight
from tiny_llama import make_checkpoint


def test_tells_layout_batch_memory_and_the_first_batch_with_its_mask(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    chats = make_chats(model, tmp_path)
    recipe = replace(RECIPE, seq_len=128, global_batch=8, steps=3)
    job = replace(make_job(model, chats, tmp_path / "run", recipe=recipe, tp=2, pp=2, dp=2), split=[1, 0, 0])
    text = told(job, colours=False)
    assert "layout: 1 x 8 cpu processes = tp 2 x pp 2 x cp 1 x dp 2, 1f1b, data parallel: full" in text
    assert "pipeline rank 0: layers 0 to " in text and "pipeline rank 1: layers " in text
    assert (
        "A step takes 8 sequences of 128 tokens = 1,024 tokens: each of 2 data-parallel ranks takes 4 of them, in 2"
        " micro-batches of 2. 3 steps take 3,072 tokens: " in text
    )
    assert "an estimate, in GiB" in text
    documents = text.split("\n--\n")[1:]
    assert documents
    for document in documents:  # one chat each: the prompt as it is, the answer as what is trained
        assert document.startswith("<s>[INST] Option")
        prompt, answer = document.split("[/INST]")
        assert "⟦" not in prompt
        assert answer.strip(" ⟦⟧").removesuffix("</s>").strip() in ANSWERS and answer.endswith("</s>⟧")


def test_of_text_and_without_a_tokenizer(checkpoint, dataset, tmp_path: Path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", cp=2)
    text = told(job, colours=False)
    assert "tp 1 x pp 1 x cp 2 x dp 1" in text
    assert "the first micro-batch: 64 tokens" in text and "has no tokenizer to show them with" in text


def test_a_layout_of_gpus_is_told_where_there_are_none(
    checkpoint, dataset, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    arguments = finetune_arguments(checkpoint, dataset, tmp_path)
    arguments[arguments.index("cpu")] = "cuda"
    result = CliRunner().invoke(group, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "layout: 1 x 2 cuda processes = tp 2 x pp 1 x cp 1 x dp 1" in result.stdout
    assert "could not train it: the layout wants 2 GPUs on each node, and torch sees 0 here" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_test_part_without_tokens_is_told_before_training(checkpoint, dataset, tmp_path: Path, caplog) -> None:
    """perplexity, which evaluate measures after the training, has nothing else to read."""
    job = make_job(checkpoint, dataset, tmp_path / "run")
    for split, empty in (([90, 5, 5], False), ([99.9, 0.1, 1e-9], True), ([100, 0, 0], False)):
        caplog.clear()
        preflight(replace(job, split=split))
        said = f"the test part of {dataset} holds no tokens"
        assert (said in caplog.text and "evaluate cannot measure perplexity" in caplog.text) == empty
        if empty:
            with pytest.raises(UserError, match=said):
                list(heldout(dataset, split, "test", 32))

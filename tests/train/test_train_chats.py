"""Training on chats against transformers, which sees each conversation alone, with labels of -100."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from chats import ANSWERS, QUESTIONS, make_chats
from jobs import RECIPE, losses, make_job, run_job
from transformers import AutoModelForCausalLM

from llmpipe.data.batches.packing import ChatSamples
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight
from tiny_llama import make_checkpoint

SEQ_LEN = 128
STEPS = 3


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chats(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chats(chat_model, tmp_path_factory.mktemp("chats"))


def job(model: Path, chats: Path, run: Path, **changes: Any) -> Job:
    """A job whose steps are whole epochs."""
    recipe, layout = changes.pop("recipe", {}), changes
    recipe = replace(RECIPE, seq_len=SEQ_LEN, steps=STEPS, **recipe)
    rows = ChatSamples(chats, [1, 0, 0], "train", SEQ_LEN, 1, 0, packing=recipe.packing).samples_per_epoch
    made = make_job(model, chats, run, replace(recipe, global_batch=rows), **({"micro_batch": 1} | layout))
    return replace(made, split=[1, 0, 0])


def expected(model: Path, lines: list[dict[str, Any]], rest: float = 0.0) -> torch.Tensor:
    """transformers' losses of as many steps over all conversations: BOS, the question, the answer, EOS."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in network.parameters() if p.ndim == ndim], "weight_decay": decay} for ndim, decay in
         ((2, 0.1), (1, 0.0))], betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    found = []
    for line in lines:
        total, weight = torch.zeros(()), 0.0
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
            prompt, whole = (
                sp.encode(text) for text in (f"[INST] {question} [/INST]", f"[INST] {question} [/INST] {answer} ")
            )
            assert whole[: len(prompt)] == prompt
            ids = torch.tensor([[1, *whole, 2]])
            answered = ids.clone()
            answered[:, : 1 + len(prompt)] = -100
            asked = torch.where(answered == -100, ids, -100)
            for labels, share in ((answered, 1.0), (asked, rest)):
                counted = int((labels[:, 1:] != -100).sum())
                total = total + share * counted * network(ids, labels=labels).loss
                weight += share * counted
        loss = total / weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for parameters in optimizer.param_groups:
            parameters["lr"] = line["lr"]
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def packed(chat_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_job(job(chat_model, chats, tmp_path_factory.mktemp("packed")))


def test_packed_chats_train_as_transformers_does_unpacked(packed, chat_model: Path) -> None:
    torch.testing.assert_close(losses(packed), expected(chat_model, packed), rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_alone_or_packed_it_is_the_same_training(micro_batch, packed, chat_model, chats, tmp_path) -> None:
    """With steps that are epochs: every chat counts once, whatever stands beside it."""
    made = job(chat_model, chats, tmp_path / "run", recipe={"packing": False}, micro_batch=micro_batch)
    torch.testing.assert_close(losses(run_job(made)), losses(packed), rtol=1e-5, atol=0)


def test_the_rate_counts_tokens_that_went_through_the_model(chat_model, chats, tmp_path) -> None:
    """Chats that stand alone are padded to a multiple of 16, not to whole sequences; a skipped step has none."""
    made = job(chat_model, chats, tmp_path / "run", recipe={"packing": False, "skip_steps": [2]})
    sp = sentencepiece.SentencePieceProcessor(model_file=str(chat_model / "tokenizer.model"))
    texts = [f"[INST] {question} [/INST] {answer} " for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    tokens = sum(-(-(len(sp.encode(text)) + 1) // 16) * 16 for text in texts)  # BOS, and EOS is a label only
    first, skipped, last = run_job(made)
    for line in (first, last):
        assert line["tokens_per_second"] == pytest.approx(tokens / line["seconds"], rel=1e-2)
    assert tokens < 0.7 * SEQ_LEN * len(texts)
    assert skipped["tokens_per_second"] == skipped["mfu_full"] == 0


def test_scalar_loss_mask_weights_what_is_not_the_assistants(chat_model, chats, tmp_path) -> None:
    found = run_job(job(chat_model, chats, tmp_path / "run", recipe={"scalar_loss_mask": 0.3}))
    torch.testing.assert_close(losses(found), expected(chat_model, found, rest=0.3), rtol=1e-5, atol=0)


def test_accuracies_of_a_step_are_those_of_transformers_choices(chat_model, chats, tmp_path) -> None:
    """With all roles trained: of all labels, and of the assistant's alone."""
    line = run_job(job(chat_model, chats, tmp_path / "run", recipe={"scalar_loss_mask": 1.0}, tp=2))[0]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(chat_model / "tokenizer.model"))
    network = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    hits, of_assistant = [], []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        prompt = sp.encode(f"[INST] {question} [/INST]")
        ids = torch.tensor([1, *sp.encode(f"[INST] {question} [/INST] {answer} "), 2])
        with torch.no_grad():
            hits.append(network(ids[None]).logits[0, :-1].argmax(-1) == ids[1:])
        of_assistant.append(torch.arange(len(ids) - 1) >= len(prompt))
    right, assistant = torch.cat(hits).double(), torch.cat(of_assistant)
    assert line["accuracy"] == pytest.approx(float(right.mean()))
    assert line["assistant_accuracy"] == pytest.approx(float(right[assistant].mean()))


def test_chats_that_do_not_fit_are_refused_before_training(chat_model, chats, tmp_path) -> None:
    made = job(chat_model, chats, tmp_path / "run")
    preflight(made)
    with pytest.raises(ValueError, match="and seq_len 30 has no room for them"):
        preflight(replace(made, recipe=replace(made.recipe, seq_len=30)))

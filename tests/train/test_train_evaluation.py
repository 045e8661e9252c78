"""Evaluation while training and token accuracy, against transformers and `llmpipe evaluate`'s perplexity."""

import json
import sys
from dataclasses import replace
from itertools import chain, pairwise, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job
from transformers import AutoModelForCausalLM

from llmpipe.checkpoint.formats import open_source
from llmpipe.cli import group
from llmpipe.data.batches.held_out import HeldOut, heldout
from llmpipe.data.batches.loader import Loader
from llmpipe.data.batches.row import Row
from llmpipe.data.batches.sampling import Blend
from llmpipe.errors import UserError
from llmpipe.evaluate.perplexity import model_perplexity
from llmpipe.families import FAMILIES
from llmpipe.inference.forward import Engine
from llmpipe.train import evaluation, loop
from llmpipe.train.job import Job
from llmpipe.train.preflight import preflight

SPLIT = [80.0, 15.0, 5.0]
RECIPE_64 = replace(RECIPE, seq_len=64, steps=4, eval_every=2)  # every document fits into a row


LAYOUTS = {
    "tp2-pp2": {"tp": 2, "pp": 2},
    "cp2-dp2, plain": {"cp": 2, "dp": 2, "data_parallel": "plain"},
    "pp2-vp2": {"pp": 2, "vp": 2, "data_parallel": "optimizer"},
}


def evaluated_job(checkpoint: Path, dataset: Path, run: Path, recipe=RECIPE_64, **layout) -> Job:
    return replace(make_job(checkpoint, dataset, run, recipe=recipe, **layout), split=SPLIT)


@pytest.fixture(scope="module")
def single(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[dict]]:
    job = evaluated_job(checkpoint, dataset, tmp_path_factory.mktemp("evaluated"))
    return job, run_job(job)


def evaluations(lines: list[dict]) -> dict[tuple[int, str], float]:
    return {
        (line["step"], key): value
        for line in lines
        for key, value in line.items()
        if key.startswith("eval_") and key != "eval_seconds"
    }


def test_equals_transformers_and_the_evaluate_command(single, checkpoint, dataset) -> None:
    job, lines = single
    assert {step for step, _ in evaluations(lines)} == {2, 4}
    source, family = open_source(job.run / "weights"), FAMILIES["llama"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict({family.hf_name(key, source.shape): source.read(key) for key in source.keys()})  # noqa: SIM118
    documents = [document.tolist() for document in heldout(dataset, SPLIT, "validation", sys.maxsize)]
    total, hits, count = 0.0, 0, 0
    for document in documents:
        tokens = torch.tensor(document)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, tokens[1:], reduction="sum"))
        hits, count = hits + int((logits.argmax(-1) == tokens[1:]).sum()), count + len(document) - 1
    assert lines[3]["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    assert lines[3]["eval_accuracy"] == pytest.approx(hits / count)
    ours = model_perplexity(Engine.open(job.run / "weights"), documents, 64)
    assert ours.tokens == count and lines[3]["eval_perplexity"] == pytest.approx(ours.value, rel=1e-6)


def test_inspect_tells_of_the_last_evaluation(single) -> None:
    job, lines = single
    shown = CliRunner().invoke(group, ["inspect", str(job.run)]).output
    loss, perplexity = lines[3]["eval_loss"], lines[3]["eval_perplexity"]
    assert f"held out      loss {loss:.4f}, perplexity {perplexity:.3f} after step 4" in shown
    assert f"accuracy      {lines[3]['accuracy']:.1%} of the last step's trained tokens" in shown


def test_without_held_out_documents_it_is_refused(checkpoint, dataset, tmp_path) -> None:
    job = replace(evaluated_job(checkpoint, dataset, tmp_path / "run"), split=[95.0, 0.0, 5.0])
    with pytest.raises(UserError, match=r"the validation part of .* holds no tokens"):
        preflight(job)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_evaluates_as_one_process(layout, single, checkpoint, dataset, tmp_path) -> None:
    lines = run_job(evaluated_job(checkpoint, dataset, tmp_path / "run", **layout))
    assert evaluations(lines) == pytest.approx(evaluations(single[1]), rel=1e-4)
    for key in ("accuracy", "epoch"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in single[1]], abs=3e-3)
    torch.testing.assert_close(losses(lines), losses(single[1]), rtol=1e-5, atol=0)


def test_changes_nothing_of_the_training_and_is_exact_under_resume(single, checkpoint, dataset, tmp_path) -> None:
    job, lines = single
    without = evaluated_job(checkpoint, dataset, tmp_path / "without", recipe=replace(RECIPE_64, eval_every=0))
    assert without.digest() == job.digest()
    assert [line["loss"] for line in run_job(without)] == [line["loss"] for line in lines]
    assert_same_weights(job.run / "weights", without.run / "weights")
    resumed = evaluated_job(checkpoint, dataset, tmp_path / "resumed")
    assert [line["step"] for line in run_job(replace(resumed, exit_at_step=3))] == [1, 2, 3]
    assert evaluations(run_job(resumed)) == evaluations(lines)
    of_all_attempts = sum(line["seconds"] + line.get("eval_seconds", 0.0) for line in run_job(resumed))
    record = json.loads((resumed.run / "run.json").read_text())
    assert record["seconds"] == pytest.approx(of_all_attempts, abs=1e-3)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2}], ids=str)
def test_a_training_that_has_to_stop_does_not_evaluate_to_the_end(
    layout, single, checkpoint, dataset, tmp_path, monkeypatch
) -> None:
    """The time until a job's limit is for saving."""
    job = evaluated_job(checkpoint, dataset, tmp_path / "run", replace(RECIPE_64, eval_every=1), **layout)
    with monkeypatch.context() as patch:
        answers = chain([False], repeat(True))  # asked to stop while it evaluates
        patch.setattr(evaluation, "LOOKS_EVERY", 1)
        patch.setattr(loop, "asked_to_stop", lambda run: next(answers))
        (line,) = run_job(job)
    assert line["step"] == 1 and not any(key.startswith("eval_") for key in line)
    assert [line["step"] for line in run_job(job) if "eval_loss" in line] == [2, 3, 4]
    torch.testing.assert_close(losses(run_job(job)), losses(single[1]), rtol=1e-5, atol=0)


def test_accuracy_of_a_step_is_transformers(single, checkpoint, dataset) -> None:
    lines = single[1]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    blend = Blend({dataset: 1.0}, SPLIT, "train", 64, 4 * 8, RECIPE.seed)
    batch = Loader(blend, 64, 8, 8, 1, 0, isolate_documents=True).step(0)
    hits = 0.0
    bounds = sorted(set(batch.cu_seqlens.flatten().tolist()))
    tokens, labels, weights = (x.flatten() for x in (batch.tokens, batch.labels, batch.weights))
    for start, end in pairwise(bounds):
        with torch.no_grad():
            chosen = model(tokens[None, start:end]).logits[0].argmax(-1)
        hits += float(((chosen == labels[start:end]) * weights[start:end]).sum())
    assert lines[0]["accuracy"] == pytest.approx(hits / float(weights.sum()))
    assert "assistant_accuracy" not in lines[0]


def test_a_limit_takes_whole_documents_in_every_epoch_of_rows_the_same(dataset) -> None:
    def rows(most: int) -> list[list[int]]:
        return [row.tokens.tolist() for row in rows_of(HeldOut({dataset: 1.0}, SPLIT, "validation", 64, most, seed=5))]

    assert len(rows(4)) == 4 and rows(4) == rows(4)
    documents = [document.tolist() for document in heldout(dataset, SPLIT, "validation", sys.maxsize)]
    predicted = sum(len(document) - 1 for document in documents)
    found_rows = rows_of(HeldOut({dataset: 1.0}, SPLIT, "validation", 64, 0, seed=5))
    assert sum(int(row.weights.sum()) for row in found_rows) == predicted
    found = sorted(tuple(row.labels[start:end]) for row in found_rows for start, end in spans(row))
    assert found == sorted(tuple(document[1:]) for document in documents if len(document) > 1)


def test_long_texts_are_cut_into_pieces_that_predict_each_token_once(dataset) -> None:
    found_rows = rows_of(HeldOut({dataset: 1.0}, SPLIT, "validation", 7, 0, seed=5))
    pieces = [document.tolist() for document in heldout(dataset, SPLIT, "validation", 7)]
    found = sorted(tuple(row.labels[start:end]) for row in found_rows for start, end in spans(row))
    assert found == sorted(tuple(piece[1:]) for piece in pieces if len(piece) > 1)


def rows_of(held_out: HeldOut) -> list[Row]:
    return held_out.read(np.arange(len(held_out)))


def spans(row) -> list[tuple[int, int]]:
    """Where the documents of a row are; what fills it up is none."""
    bounds = [0, *row.starts, len(row)]
    return [(start, end) for start, end in pairwise(bounds) if row.weights[start]]

"""The engine against transformers over 20 steps in fp32, and stopped and gone on; layouts: test_parity_matrix.py."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from jobs import RECIPE, assert_same_weights, losses, make_job, run_job, train_until_10, trained_by_transformers
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, named_size
from llmpipe.layout import Layout
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks
from llmpipe.parallel.tensor import Weight
from llmpipe.train import state
from llmpipe.train.job import Job
from llmpipe.train.optimizer import Optimizer


@pytest.fixture(scope="module")
def single(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, list[dict]]:
    job = make_job(checkpoint, dataset, tmp_path_factory.mktemp("single"))
    return job, run_job(job)


def test_trains_as_transformers_with_torch_adamw(single, checkpoint, dataset) -> None:
    job, lines = single
    model, expected = trained_by_transformers(checkpoint, dataset, lines)
    torch.testing.assert_close(losses(lines), expected, rtol=1e-5, atol=0)
    ours, family = open_source(job.run / "weights"), FAMILIES["llama"]
    for key in ours.keys():  # noqa: SIM118
        theirs = model.state_dict()[family.hf_name(key, ours.shape)]
        torch.testing.assert_close(ours.read(key), theirs, rtol=1e-3, atol=2e-5)


def test_tied_embeddings_train_as_in_transformers(checkpoint, dataset, tmp_path) -> None:
    tied = tmp_path / "tied"
    config = LlamaConfig.from_pretrained(checkpoint, tie_word_embeddings=True, num_hidden_layers=2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tied)
    manifest.write(tied, "checkpoint", {})
    recipe = replace(RECIPE, steps=5)
    lines = run_job(make_job(tied, dataset, tmp_path / "run", recipe=recipe, tp=2, dp=2))
    _, expected = trained_by_transformers(tied, dataset, lines)
    torch.testing.assert_close(losses(lines), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 2, "dp": 2}], ids=["1", "tp2-pp2-dp2"])
def test_stop_and_resume_is_bit_identical(layout, checkpoint, dataset, tmp_path) -> None:
    whole = make_job(checkpoint, dataset, tmp_path / "whole", **layout)
    whole_lines = run_job(whole)
    half = make_job(checkpoint, dataset, tmp_path / "half", recipe=replace(RECIPE, save_every=10), **layout)
    run_ranks(train_until_10, half.layout.processes, half)
    assert not (half.run / "run.json").exists()
    (half.run / "stop").unlink()
    half_lines = run_job(half)
    assert [line["step"] for line in half_lines] == list(range(1, 21))
    assert [line["loss"] for line in half_lines] == [line["loss"] for line in whole_lines]
    assert_same_weights(whole.run / "weights", half.run / "weights")


SLOW = pytest.mark.slow
OTHER_LAYOUTS = [
    ({"tp": 2, "pp": 2}, {"dp": 2}),
    ({"dp": 2}, {"cp": 2, "pp": 2}),
    pytest.param({}, {"tp": 2, "pp": 2, "dp": 2}, marks=SLOW),
    pytest.param({"pp": 2}, {"tp": 2, "cp": 2}, marks=SLOW),
    pytest.param({"tp": 2}, {"pp": 2, "vp": 2}, marks=SLOW),
    pytest.param({"cp": 2}, {"pp": 2, "dp": 2}, marks=SLOW),
    pytest.param({"cp": 2, "tp": 2}, {"cp": 4}, marks=SLOW),
    pytest.param({"pp": 2, "cp": 2}, {"tp": 2, "dp": 2, "data_parallel": "plain"}, marks=SLOW),
    pytest.param({"dp": 4, "nodes": 2, "data_parallel": "hybrid"}, {"cp": 2, "pp": 2}, marks=SLOW),
    pytest.param({"pp": 2, "vp": 2}, {"pp": 4}, marks=SLOW),
]


@pytest.mark.parametrize(("before", "after"), OTHER_LAYOUTS, ids=str)
def test_resumes_in_another_layout(before, after, single, checkpoint, dataset, tmp_path) -> None:
    recipe = replace(RECIPE, save_every=10)
    first = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe, **before)
    run_ranks(train_until_10, first.layout.processes, first)
    (first.run / "stop").unlink()
    done = [json.loads(line) for line in first.live.read_text().splitlines()]
    second = make_job(checkpoint, dataset, tmp_path / "run", recipe=recipe, **after)
    lines = run_job(second)
    assert lines[:10] == done  # with their seconds: they were not trained again
    torch.testing.assert_close(losses(lines), losses(single[1]), rtol=1e-5, atol=0)
    ours, expected = (open_source(job.run / "weights") for job in (second, single[0]))
    for key in expected.keys():  # noqa: SIM118
        difference = ours.read(key) - expected.read(key)
        assert difference.norm() <= 1e-5 * expected.read(key).norm(), key


def test_a_blend_goes_on_in_another_layout_as_in_transformers(checkpoint, dataset, other_dataset, tmp_path) -> None:
    blend = {dataset: 0.7, other_dataset: 0.3}
    first, second = (
        replace(
            make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, save_every=10), **layout),
            data={str(prefix): weight for prefix, weight in blend.items()},
        )
        for layout in ({"dp": 2}, {"tp": 2})
    )
    run_ranks(train_until_10, 2, first)
    (first.run / "stop").unlink()
    lines = run_job(second)
    _, expected = trained_by_transformers(checkpoint, blend, lines)
    torch.testing.assert_close(losses(lines), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("damaged", ["__0_0.distcp", ".metadata", "live.jsonl"])
def test_a_damaged_checkpoint_is_not_resumed_from(damaged, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, save_every=5))
    run_ranks(train_until_10, 1, job)
    (job.run / "stop").unlink()
    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    file = newest / damaged
    file.write_bytes(file.read_bytes()[:-10])
    for found in run_ranks(newest_checkpoint, 2, job):
        assert found and found.name == "step-00000005"


def newest_checkpoint(job: Job) -> Path | None:
    return state.newest(job, job.recipe.steps)


def newest_on_a_failing_disk(job: Job, name: str, rank: int) -> Path | None:
    """A rank cannot read from the newest checkpoint."""
    original = getattr(manifest, name)

    def fail(directory: Path, *part: int) -> manifest.Manifest:
        if dist.get_rank() == rank and directory.name == "step-00000004":
            raise OSError(errno.EIO, "Input/output error")
        return original(directory, *part)

    setattr(manifest, name, fail)
    return newest_checkpoint(job)


def test_a_checkpoint_that_the_disk_does_not_give_is_not_resumed_from(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, steps=4, save_every=2))
    run_job(job)
    for name, rank in (("check", 1), ("read", 0)):
        for found in run_ranks(newest_on_a_failing_disk, 2, job, name, rank):
            assert found and found.name == "step-00000002"


def test_fewer_steps_than_a_checkpoint_has_start_anew(checkpoint, dataset, tmp_path) -> None:
    long = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, steps=8, save_every=4))
    run_job(long)
    (long.run / "run.json").unlink()
    short = replace(long, recipe=replace(RECIPE, steps=2, save_every=1))
    assert short.checkpoints == long.checkpoints
    assert [line["step"] for line in run_job(short)] == [1, 2]
    saved = sorted(path.name for path in short.checkpoints.iterdir())
    assert saved == ["step-00000001", "step-00000002", "step-00000004", "step-00000008"]


def test_metrics_are_those_of_the_checkpoint(checkpoint, dataset, tmp_path) -> None:
    first = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, save_every=5))
    run_ranks(train_until_10, 1, first)
    (first.run / "stop").unlink()
    told = (first.run / "live.jsonl").read_text().splitlines()
    other = replace(first, recipe=replace(RECIPE, lr=1e-3, steps=12, save_every=50))  # into the same folder
    run_job(other)
    (first.run / "run.json").unlink()
    run_job(first)
    assert (first.run / "metrics.jsonl").read_text().splitlines()[:10] == told


def test_a_rank_without_rows_of_a_shared_parameter_takes_part() -> None:
    """More dp ranks than a KV head or a norm has rows: FSDP2 leaves some with none."""
    assert run_ranks(norm_of_nothing, 2) == [0.0, 0.0]


def norm_of_nothing() -> float:
    groups = make_groups(Layout(tp=2, gpus_per_node=2, device="cpu").resolved(), torch.device("cpu"))
    model = torch.nn.ModuleDict({"norm": Weight(0)})
    optimizer = Optimizer(model, named_size("llama2_7b"), RECIPE, groups)
    next(model.parameters()).grad = torch.empty(0)
    return optimizer.reduce_and_clip()


def test_recompute_changes_nothing(single, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, recompute="full"), tp=2, pp=2)
    torch.testing.assert_close(losses(run_job(job)), losses(single[1]), rtol=1e-5, atol=0)


def test_bf16_follows_fp32(single, checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", recipe=replace(RECIPE, precision="bf16"), tp=2, pp=2, dp=2)
    lines = run_job(job)
    torch.testing.assert_close(losses(lines), losses(single[1]), rtol=2e-2, atol=0)
    with safe_open(job.run / "weights/tp0-pp0.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_other_inputs_start_a_folder_of_their_own(checkpoint, dataset, tmp_path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run")
    assert make_job(checkpoint, dataset, tmp_path / "run", tp=2, pp=2).checkpoints == job.checkpoints
    assert replace(job, recipe=replace(RECIPE, steps=40)).checkpoints == job.checkpoints
    assert replace(job, recipe=replace(RECIPE, lr=1e-4)).checkpoints != job.checkpoints
    assert replace(job, split=[80, 10, 10]).checkpoints != job.checkpoints


def test_metrics_of_a_step(single) -> None:
    job, lines = single
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["tokens_per_second"] == pytest.approx(8 * 32 / line["seconds"], rel=1e-2)
        assert line["memory_bytes"] > 0 and line["mfu_full"] > line["mfu_causal"] > 0
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    record = json.loads((job.run / "run.json").read_text())
    assert record["exit_reason"] == "finished" and record["steps"] == 20


def test_weights_that_changed_since_they_were_judged_are_refused(checkpoint, dataset, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    file = model / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(UserError, match=r"model\.safetensors does not have the SHA-256 that manifest\.json says"):
        run_job(make_job(model, dataset, tmp_path / "run"))


def test_inspect_tells_of_a_run(single) -> None:
    job, lines = single
    shown = CliRunner().invoke(group, ["inspect", str(job.run)]).output
    assert f"steps         20 of 20, 5,120 tokens, loss {lines[-1]['loss']:.4f}" in shown
    assert "state         finished" in shown and "checkpoints   step-00000020" in shown
    (job.run / "run.json").rename(job.run / "aside.json")
    try:
        job.write()
        assert "state         not finished" in CliRunner().invoke(group, ["inspect", str(job.run)]).output
    finally:
        (job.run / "aside.json").rename(job.run / "run.json")

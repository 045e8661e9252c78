"""RUN/job.json: what a training is given, and what of it makes it another training."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llmpipe import launch
from llmpipe.checkpoint import manifest
from llmpipe.data.dataset import manifest as dataset_manifest
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.job import Job, job_split, read_job
from llmpipe.train.loop import train
from llmpipe.train.preflight import check_steps
from llmpipe.train.record import of_job


def job(folder: Path, **more: object) -> Job:
    recipe = Recipe(seq_len=8, global_batch=2, steps=3, lr=1e-3)
    given = {"model": "m", "data": {"a": 1.0}, "split": [1.0, 0.0, 0.0], "output": str(folder)}
    return Job(recipe=recipe, layout=Layout(device="cpu").resolved(), **given | more)  # type: ignore[arg-type]


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = job(tmp_path, validation={"b": 1.0}, test={"c": 2.0})
    made.write()
    assert read_job(made.path) == made


def test_what_the_launcher_found_is_not_hashed_again(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset without a manifest, tokenized again in mid-run and then gone: the job stays the one that began."""
    copy = tmp_path / "corpus"
    for kind in (".bin", ".idx"):
        shutil.copy(f"{dataset}{kind}", f"{copy}{kind}")
    files = [hashlib.sha256((tmp_path / f"corpus{kind}").read_bytes()).hexdigest() for kind in (".bin", ".idx")]
    digest = hashlib.sha256("".join(files).encode()).hexdigest()
    run, model = tmp_path / "run", manifest.read(checkpoint).digest
    given = job(run, model=str(checkpoint), data={str(copy): 1.0})

    def ranks(*_: object) -> int:
        (tmp_path / "corpus.bin").write_bytes(b"\1\0")
        told = read_job(run / "job.json")
        assert (told.inputs.model, told.inputs.data) == (model, {str(copy): digest})
        assert (told.digest(), told.checkpoints) == begun
        assert given.digest() != begun[0]  # what asks the files now
        (tmp_path / "corpus.bin").unlink()
        assert told.digest() == begun[0]
        record = of_job(told)
        assert (record["data"][0]["digest"], record["model"]["checkpoint_digest"]) == (digest, model)
        return 0

    begun = given.digest(), given.checkpoints
    monkeypatch.setattr(launch, "supervise_torchrun", ranks)
    assert launch.launch(given, launch.Place(), None, 0) == 75


def test_a_model_whose_link_leads_elsewhere_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Ranks that start again would train another model than the one that the run's checkpoints are of."""
    link, other = tmp_path / "latest", tmp_path / "other"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    digests = [manifest.read(checkpoint).digest, manifest.write(other, "checkpoint", {}).digest]
    link.symlink_to(checkpoint)
    told = replace(job(tmp_path, model=str(link)), data={}).with_inputs()
    told.check_model()
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(
        UserError, match=f"is of checkpoint {digests[1]} now, and this training began with {digests[0]}"
    ):
        told.check_model()


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_dataset_that_is_written_anew_is_refused_unless_it_is_the_same(
    has_manifest: bool, checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    """Ranks that start again would train on other tokens than those that the run's checkpoints are of."""
    copy = tmp_path / "corpus"
    for kind in (".bin", ".idx"):
        shutil.copy(f"{dataset}{kind}", f"{copy}{kind}")
    os.utime(f"{copy}.bin", (0, 0))
    if has_manifest:
        dataset_manifest.write(copy, {})
    told = job(tmp_path / "run", model=str(checkpoint), data={str(copy): 1.0}).with_inputs()
    tokens = Path(f"{copy}.bin")
    before = tokens.read_bytes()
    tokens.write_bytes(before)
    told.check_data()
    tokens.write_bytes(before[2:] + before[:2])
    said = "corpus.bin is damaged" if has_manifest else "corpus is another dataset now than the one that this training"
    with pytest.raises(UserError, match=said):
        told.check_data()
    if has_manifest:  # tokenized again, by other rules
        dataset_manifest.write(copy, {})
    told.run.mkdir()
    with pytest.raises(UserError, match="corpus is another dataset now than the one that this training began with"):
        run_ranks(train, 1, told)
    tokens.write_bytes(before)
    dataset_manifest.manifest_path(copy).unlink(missing_ok=True)
    told.check_data()


def test_of_a_job_without_hashes_none_are_told(tmp_path: Path) -> None:
    """As an older launcher wrote it, read where neither model nor data are found."""
    record = of_job(job(tmp_path))
    assert record["model"]["checkpoint_digest"] is record["data"][0]["digest"] is None


def test_a_dataset_is_trained_on_or_held_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a is held out, for validation or test, and trained on as well: take it out"):
        replace(job(tmp_path), test={"a": 1.0})


def test_the_split_beside_held_out_datasets() -> None:
    assert job_split(None, held_out=False) == [969, 30, 1]
    assert job_split("8,1,1", held_out=False) == [8, 1, 1]
    assert job_split(None, held_out=True) == [1, 0, 0]
    with pytest.raises(UserError, match="--split 8,1,1 takes documents of --data away from training, but --validation"):
        job_split("8,1,1", held_out=True)


def test_steps_that_there_are_not_are_not_traced(tmp_path: Path) -> None:
    check_steps(job(tmp_path, profile_steps=[3, 9]))
    with pytest.raises(UserError, match="--profile-steps 4: there are only 3 steps to trace"):
        check_steps(job(tmp_path, profile_steps=[4, 9]))


def test_a_warmup_beyond_the_last_step_is_said(tmp_path: Path, caplog) -> None:
    for warmup, is_said in ((0.9, False), (3, False), (4, True)):
        caplog.clear()
        made = job(tmp_path)
        check_steps(replace(made, recipe=replace(made.recipe, schedule=Schedule(warmup=warmup))))
        assert ("goes on beyond the last of 3 steps: the rate never comes to lr 0.001" in caplog.text) is is_said

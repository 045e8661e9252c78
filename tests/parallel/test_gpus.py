"""Locks of GPUs, on a machine with eight fake ones: a fake nvidia-smi names them."""

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmpipe import launch
from llmpipe.errors import UserError
from llmpipe.evaluate import evaluate
from llmpipe.evaluate.plan import Plan
from llmpipe.layout import Layout
from llmpipe.parallel import gpus
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.supervise import StopRequest

UUIDS = [f"GPU-{number}{number}{number}{number}" for number in range(8)]
context = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def eight_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    asked = '[ "$*" = "--query-gpu=uuid --format=csv,noheader" ] || exit 1'
    (programs / "nvidia-smi").write_text("\n".join(["#!/bin/sh", asked, *(f"echo {uuid}" for uuid in UUIDS)]))
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "LOCKS", tmp_path / "locks")
    monkeypatch.setattr(gpus, "POLL", 0.01)
    (tmp_path / "locks").mkdir()


def named() -> list[str]:
    return os.environ["CUDA_VISIBLE_DEVICES"].split(",")


def test_the_variable_names_gpus_that_others_do_not_have_and_is_as_before_afterwards() -> None:
    with gpus.taken(3):
        first = named()
        with gpus.taken(0):
            assert named() == first
        with pytest.raises(UserError, match="2 of the GPUs"), gpus.taken(2, 0):  # of these three
            pass
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert first == UUIDS[:3]
    with pytest.raises(UserError, match="9 GPUs are wanted, and this machine has 8: GPU-0000, "), gpus.taken(9):
        pass


@pytest.mark.parametrize(
    ("told", "expected"),
    [("5,3", ["GPU-5555", "GPU-3333"]), ("GPU-6666,1", ["GPU-6666", "GPU-1111"]), ("MIG-x/1/0", ["MIG-x/1/0"])],
)
def test_only_those_that_were_named_are_taken(told: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    with gpus.taken(len(expected)):
        assert named() == expected
    with (
        pytest.raises(
            UserError,
            match=rf"{len(expected) + 1} GPUs are wanted, and {gpus.VARIABLE} names {len(expected)}: {expected[0]}",
        ),
        gpus.taken(len(expected) + 1),
    ):
        pass
    assert os.environ["CUDA_VISIBLE_DEVICES"] == told


def test_without_nvidia_smi_they_have_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpus.visible() == ["0", "1"]


def test_a_driver_that_hangs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\nexec sleep 600\n")
    monkeypatch.setattr(gpus, "ASK_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"nvidia-smi does not answer within 0\.1 s"), gpus.taken(1):
        pass


def test_one_that_stands_still_while_it_looks_is_not_waited_for_without_limit() -> None:
    looking = gpus._locked("all")
    assert looking
    with pytest.raises(UserError, match="other llmpipe processes here have too many"), gpus.taken(1, 0.05):
        pass
    os.close(looking)
    with gpus.taken(8):
        assert named() == UUIDS


def work(log: Path, count: int) -> None:
    """Take GPUs, say so, and say so again before giving them back."""
    with gpus.taken(count, 300), log.open("a") as file:
        assert len(set(named())) == count
        file.write("".join(f"+{name}\n" for name in named()))
        file.flush()
        time.sleep(0.02)
        file.write("".join(f"-{name}\n" for name in named()))


def test_of_many_jobs_no_two_ever_meet_on_one(tmp_path: Path) -> None:
    draw, log = random.Random(0), tmp_path / "log"
    jobs = [context.Process(target=work, args=(log, draw.choice((1, 2, 4, 8)))) for _ in range(40)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    busy: set[str] = set()
    lines = log.read_text().split()
    for line in lines:
        if line[0] == "+":
            assert line[1:] not in busy, lines
            busy.add(line[1:])
        else:
            busy.remove(line[1:])
    assert not busy and len(lines) > 80


def holding(count: int) -> multiprocessing.process.BaseProcess:
    """A process that has taken GPUs."""

    def hold() -> None:
        with gpus.taken(count):
            (gpus.LOCKS / "held").touch()
            time.sleep(300)

    job = context.Process(target=hold)
    job.start()
    while not (gpus.LOCKS / "held").exists():
        time.sleep(0.01)
    return job


def test_a_killed_job_has_none() -> None:
    job = holding(8)
    with pytest.raises(UserError, match="other llmpipe processes here have too many"), gpus.taken(1, 0.05):
        pass
    assert job.pid
    os.kill(job.pid, signal.SIGKILL)
    with gpus.taken(8, 60):
        assert named() == UUIDS
    job.join()


def test_a_launcher_gives_its_ranks_gpus_of_their_own(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def ranks(argv: list[str], variables: dict[str, str], stop: StopRequest) -> int:
        found.append(variables["CUDA_VISIBLE_DEVICES"])
        if len(found) == 1:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # for another launcher, beside this one
            assert launch.launch(replace(job, output=str(tmp_path / "other")), launch.Place(), None, 0) == 75
        return 0

    monkeypatch.setattr(launch, "supervise_torchrun", ranks)
    recipe, layout = Recipe(seq_len=32, global_batch=8, steps=2, lr=1e-3), Layout(gpus_per_node=4).resolved()
    job = Job(
        recipe=recipe, layout=layout, model=str(checkpoint), data={str(dataset): 1.0}, split=[90, 5, 5],
        output=str(tmp_path / "run"),
    )  # fmt: skip
    assert launch.launch(job, launch.Place(), None, 0) == 75
    assert found == [",".join(UUIDS[:4]), ",".join(UUIDS[4:])]


def test_an_evaluation_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[str]] = []
    monkeypatch.setattr(gpus, "check_device", lambda _: None)
    monkeypatch.setattr(evaluate, "run_ranks", lambda *_, device: found.append(named()))
    plan = Plan(
        weights=tmp_path, tasks=[], data=[], split=[1, 1, 1], trained_on=[], reference=None, seq_len=None
    )  # fmt: skip
    training = holding(5)
    evaluate.run(plan, tmp_path / "output", "cuda", 2)
    training.kill()
    training.join()
    assert found == [UUIDS[5:7]]

"""What a launcher says of ranks that failed, in one message."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch.distributed as dist
from jobs import make_job

from finetune_command import num_steps, processes_of
from llmpipe import launch
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train import agent, failure, loop, supervise
from llmpipe.train.job import Job
from llmpipe.train.supervise import SIGNALS


@pytest.fixture
def job(checkpoint: Path, dataset: Path, tmp_path: Path) -> Job:
    recipe, layout = Recipe(seq_len=32, global_batch=8, steps=2, lr=1e-3), Layout(device="cpu").resolved()
    return Job(
        recipe=recipe, layout=layout, model=str(checkpoint), data={str(dataset): 1.0}, split=[90, 5, 5],
        output=str(tmp_path / "run"),
    )  # fmt: skip


def rank(monkeypatch: pytest.MonkeyPatch, number: int, attempt: int) -> None:
    monkeypatch.setenv("RANK", str(number))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))


def test_the_first_rank_of_the_last_attempt_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure.read(tmp_path) is None
    for attempt, number in ((0, 1), (1, 3), (1, 2), (0, 0)):
        rank(monkeypatch, number, attempt)
        failure.tell(tmp_path, f"error of {number}")
    told = failure.read(tmp_path)
    assert told and (told["rank"], told["attempt"], told["error"]) == (3, 1, "error of 3")
    assert not failure.has_to_end(tmp_path)
    rank(monkeypatch, 2, 1)
    failure.tell(tmp_path, "what the user has to mend", final=True)
    assert failure.has_to_end(tmp_path)


def test_a_word_of_the_last_attempt_stands_and_none_of_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt, said in ((2, "killed"), (3, "error of 1")):
        failure.forget(tmp_path)
        rank(monkeypatch, 1, attempt)
        failure.tell(tmp_path, "error of 1")
        monkeypatch.delenv("RANK")  # where torchrun itself runs
        failure.tell(tmp_path, "killed", of=(0, 3))
        told = failure.read(tmp_path)
        assert told and told["error"] == said


def test_one_message_says_who_where_when_and_what_to_run(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        (job.checkpoints / "step-00000007").mkdir(parents=True)
        (job.checkpoints / "step-00000007/manifest.json").touch()
        job.live.write_text(json.dumps({"step": 8}) + "\n" + json.dumps({"step": 9}) + '\n{"step": 1')
        rank(monkeypatch, 3, 2)
        failure.tell(job.run, "RuntimeError: timed out", silent="rank 1 on node 0 (host-a)")
        return 1

    monkeypatch.setattr(launch, "supervise_torchrun", fail)
    monkeypatch.setattr(sys, "argv", ["llmpipe", "finetune", "a recipe.yaml", "--tp", "2"])
    with pytest.raises(UserError) as found:
        launch.launch(job, launch.Place(), None, 0)
    said = str(found.value)
    assert "after step 9: rank 1 on node 0 (host-a) did not answer" in said and "then rank 3 on " in said
    assert "RuntimeError: timed out" in said and str(job.run / "log.txt") in said
    assert f"goes on from {job.checkpoints / 'step-00000007'}: llmpipe finetune 'a recipe.yaml' --tp 2" in said


def test_what_ends_badly_after_it_has_published_is_no_failure(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that crashes at the end of a process, say."""

    def publish_and_crash(*_: object) -> int:
        run_ranks(loop.train, 1, job)
        return 1

    monkeypatch.setattr(launch, "supervise_torchrun", publish_and_crash)
    assert launch.launch(job, launch.Place(), None, 0) == 0
    assert "is trained and published; its processes ended with status 1" in caplog.text


@pytest.fixture
def same_signals() -> Iterator[None]:
    """A launcher's handlers end with the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("same_signals")
def test_what_ended_an_earlier_attempt_is_forgotten(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """By real ranks, which torchrun has started again."""
    supervise_torchrun = launch.supervise_torchrun

    def second_attempt(argv: list[str], variables: dict[str, str], stop: supervise.StopRequest) -> int:
        rank(monkeypatch, 1, 0)
        failure.tell(job.run, "RuntimeError: timed out")
        assert failure.read(job.run)
        return supervise_torchrun(argv, variables, stop)

    monkeypatch.setattr(launch, "supervise_torchrun", second_attempt)
    assert launch.launch(job, launch.Place(), None, 0) == 0
    assert failure.read(job.run) is None


def kill_rank_after_step(job: Job, step: int) -> None:
    """kill -9 the training's only rank, once it has done so many steps; three minutes at most."""
    for _ in range(1800):
        ranks = [pid for pid, args in processes_of(job.run).items() if "-u -m llmpipe.train " in args]
        if num_steps(job.run) >= step and ranks:
            os.kill(ranks[0], signal.SIGKILL)
            return
        time.sleep(0.1)
    (job.run / "stop").touch()


@pytest.mark.usefixtures("same_signals")
def test_a_rank_that_was_killed_is_named_with_its_signal(job: Job) -> None:
    """A real one, for whose memory the kernel, say, had no room; it cannot tell itself."""
    job = replace(job, recipe=replace(job.recipe, steps=100_000))
    killer = Thread(target=kill_rank_after_step, args=(job, 2))
    killer.start()
    said = (
        rf"after step \d+: rank 0 on {socket.gethostname()}: ended without a word: killed by SIGKILL, perhaps .* memory"
    )
    with pytest.raises(UserError, match=said):
        launch.launch(job, launch.Place(restarts=0), None, 0)
    killer.join()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (3, "with status 3"),
        (-6, "killed by SIGABRT, perhaps by NCCL .*"),
        (-11, "killed by SIGSEGV"),
        (-99, "killed by signal 99"),
    ],
)
def test_how_a_process_ended(code: int, said: str) -> None:
    assert re.fullmatch(said, agent.how(code))


WAIT = """
import pathlib, sys, time
for _ in range(600):
    if pathlib.Path(sys.argv[1]).exists():
        sys.exit()
    time.sleep(0.1)
sys.exit("nobody asked")
"""


@pytest.mark.usefixtures("same_signals")
@pytest.mark.parametrize("minutes", [0.001, 0.0])
def test_it_is_asked_to_stop_by_the_clock_or_a_signal(
    job: Job, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more if the file system fails at first."""
    touch, failed = Path.touch, list[Path]()

    def fail_once(path: Path) -> None:
        if path.name == "stop" and not failed:
            failed.append(path)
            raise OSError("Stale file handle")
        touch(path)

    monkeypatch.setattr(Path, "touch", fail_once)
    monkeypatch.setattr(launch, "_torchrun", lambda *_: [sys.executable, "-c", WAIT, str(job.run / "stop")])
    if not minutes:
        monkeypatch.setattr(supervise, "die_with_parent", lambda _: os.kill(os.getppid(), signal.SIGTERM))
    assert launch.launch(job, launch.Place(exit_after_minutes=minutes), None, 0) == 75
    assert failed == [job.run / "stop"]


@pytest.mark.usefixtures("same_signals")
@pytest.mark.parametrize("ignored", [True, False])
def test_a_hangup_that_nohup_has_ignored_stops_nothing(ignored: bool, tmp_path: Path) -> None:
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = supervise.StopRequest(tmp_path, "token")
    with supervise.interruptible(), pytest.raises(KeyboardInterrupt) if not ignored else nullcontext():
        os.kill(os.getpid(), signal.SIGHUP)
    stop.listen()
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.is_signalled is not ignored


def hang_in_step_2(job: Job) -> None:
    original = loop.gradient

    def hang(trainer: loop.Trainer, step: int) -> Any:
        if step == 1 and dist.get_rank() == 3:
            time.sleep(120)
        return original(trainer, step)

    loop.gradient = hang
    loop.train(job)


def test_one_that_hangs_is_given_up_in_every_group(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    job = replace(make_job(checkpoint, dataset, tmp_path / "run", pp=2, dp=2), timeout_minutes=0.05)
    with pytest.raises(RuntimeError, match=r"rank [012] of 4 failed(.|\n)*([Tt]imed out|timeout)"):
        run_ranks(hang_in_step_2, 4, job)


@pytest.mark.usefixtures("same_signals")
def test_what_the_user_has_to_mend_is_not_tried_again(job: Job) -> None:
    """Real ranks, whose model changed after it was judged: one attempt, one message."""
    changed = job.run.parent / "model"
    shutil.copytree(job.model, changed)
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    said = r"training failed after step 0: rank 0 on .*model\.safetensors does not have the SHA-256"
    with pytest.raises(UserError, match=said):
        launch.launch(replace(job, model=str(changed)), launch.Place(), None, 0)
    assert (job.run / "log.txt").read_text().count("does not have the SHA-256") == 1

"""The lease: one trainer at a time in a run folder, whatever file locks do, and none that writes after it lost it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from jobs import RECIPE, make_job, run_job

from finetune_command import (
    LLMPIPE,
    assert_trained_alike,
    finetune_arguments,
    processes_of,
    train_undisturbed,
    wait_for_step,
)
from llmpipe import launch
from llmpipe.errors import UserError
from llmpipe.train import failure, lease
from llmpipe.train.job import Job

HERE = lease.Holder("t", os.getpid(), "7", "this-host", lease.this_machine(), None, None, "today")
ELSEWHERE = replace(HERE, host="other-host", machine="another one")


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    monkeypatch.setattr(lease, "HEARTBEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 1.0)
    monkeypatch.setattr(lease, "POLL", 0.02)
    monkeypatch.setattr(lease, "SLURM_POLL", 0.02)


def started(pid: int) -> str:
    """When a process started, as ps counts it from /proc too: field 22 of its stat (man 5 proc)."""
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1].split()[19]


@contextmanager
def a_process() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def write(run: Path, holder: lease.Holder) -> None:
    (run / lease.NAME).write_text(json.dumps(asdict(holder)))


def test_a_second_trainer_is_kept_out_and_the_third_finds_no_lease(tmp_path: Path) -> None:
    with lease.hold(tmp_path, 0) as token:
        assert json.loads((tmp_path / "lease").read_text())["pid"] == os.getpid()
        assert lease.held(tmp_path, token) and not lease.held(tmp_path, "another")
        with (
            pytest.raises(UserError, match=rf"is being trained by process {os.getpid()} on "),
            lease.hold(tmp_path, 0),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_this_machine_is_alive_while_its_process_is(tmp_path: Path) -> None:
    with a_process() as pid:
        write(tmp_path, replace(HERE, pid=pid, started=started(pid)))
        with pytest.raises(UserError, match="is being trained by"), lease.hold(tmp_path, 0):
            pass
        write(tmp_path, replace(HERE, pid=pid, started="1"))  # the number is another process's now
        with lease.hold(tmp_path, 0):
            pass
        write(tmp_path, replace(HERE, pid=pid, started=started(pid)))
    with lease.hold(tmp_path, 0):
        pass


def test_one_whose_exit_status_nobody_has_asked_for_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    write(tmp_path, replace(HERE, pid=process.pid, started=started(process.pid)))
    process.kill()
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1]:
        time.sleep(0.01)
    with lease.hold(tmp_path, 0):
        pass
    process.wait()


@pytest.mark.parametrize("content", ["", '{"pid": 1, "host": "h", "job": null}'])
def test_what_names_nobody_holds_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / lease.NAME).write_text(content)
    with lease.hold(tmp_path, 0) as token:
        assert lease.held(tmp_path, token)


def fake_squeue(says: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked about job 815; of others it says nothing, as of those that have ended."""
    (folder / "bin").mkdir()
    (folder / "bin/squeue").write_text(f"#!/bin/sh\ncase \"$*\" in *'--jobs 815 '*) {says};; esac\n")
    (folder / "bin/squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("squeue", "machine", "alive"),
    [
        ("echo RUNNING", "another", True),
        ("echo PENDING", "another", False),  # it has been put back into the queue
        ("echo COMPLETING", "another", True),  # its steps may still save
        ("echo COMPLETING", "this", True),
        ("true", "another", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "another", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "another", True),  # heartbeat
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", "this", False),  # pid
        ("echo RUNNING", "this", False),  # pid
    ],
)
def test_slurm_decides_where_it_can_be_asked(
    squeue: str, machine: str, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(squeue, tmp_path, monkeypatch)
    holder = replace(HERE if machine == "this" else ELSEWHERE, job="815", pid=2**22 + 1)  # beyond Linux's last
    write(tmp_path, holder)
    if alive:
        with pytest.raises(UserError, match="in Slurm job 815 since today"), lease.hold(tmp_path, 0):
            pass
    else:
        with lease.hold(tmp_path, 0):
            pass


@pytest.mark.parametrize("says", ["true", "echo RUNNING"], ids=["none here", "a stranger's here"])
def test_a_job_of_another_cluster_lives_by_its_heart(
    says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(says, tmp_path, monkeypatch)
    monkeypatch.setattr(lease, "CLUSTER", "ours")
    write(tmp_path, replace(ELSEWHERE, job="815", cluster="theirs"))
    begin = time.monotonic()
    with lease.hold(tmp_path, 60):
        assert time.monotonic() - begin > lease.STALE


def test_the_next_job_waits_behind_the_one_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of an earlier Snakemake, which was killed; who starts the next one is told."""
    fake_squeue("cat $0.state", tmp_path, monkeypatch)
    state, runs = tmp_path / "bin/squeue.state", tmp_path / "runs"
    for name, job in (("a", "815"), ("b", "816"), ("c", None)):
        (runs / name).mkdir(parents=True)
        write(runs / name, replace(ELSEWHERE, job=job))
    (runs / "finished").mkdir()
    state.write_text("RUNNING\n")
    told = {name: lease.queue_behind(runs / name) for name in ("a", "b", "c", "finished")}
    assert told == {"a": " --dependency=afterany:815", "b": "", "c": "", "finished": ""}
    (line,) = lease.trained_still(runs)
    assert line.startswith(f"{runs / 'a'} is being trained by process {os.getpid()} on other-host in Slurm job 815 ")
    assert "scancel --signal=TERM 815" in line
    for ended in ("", "PENDING\n", "COMPLETING\n"):  # what is put back into the queue may be behind us there
        state.write_text(ended)
        assert (lease.queue_behind(runs / "a"), lease.trained_still(runs)) == ("", [])


def test_a_job_that_slurm_started_again_elsewhere_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "JOB", "815")
    write(tmp_path, replace(ELSEWHERE, job="815"))
    with lease.hold(tmp_path, 0):
        pass


def test_one_that_nobody_can_be_asked_about_is_given_up_when_its_heart_stands_still(tmp_path: Path) -> None:
    write(tmp_path, ELSEWHERE)
    begin = time.monotonic()
    with lease.hold(tmp_path, 60):
        assert time.monotonic() - begin > lease.STALE


def hold_elsewhere(run: Path, seconds: float) -> None:
    """In a process of its own: another machine."""
    lease.this_machine = lambda: "another one"
    with lease.hold(run, 0):
        time.sleep(seconds)


def test_one_whose_heart_beats_is_waited_for(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    other = context.Process(target=hold_elsewhere, args=(tmp_path, 60))
    other.start()
    while not (tmp_path / lease.NAME).exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="is being trained by"), lease.hold(tmp_path, 3 * lease.STALE):
        pass
    other.kill()  # no answer any more, and no word of it
    with lease.hold(tmp_path, 60):
        pass
    other.join()


def count_up(run: Path) -> None:
    with lease.hold(run, 300):
        number = run / "number"
        before = int(number.read_text())
        time.sleep(0.01)
        number.write_text(str(before + 1))


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_up, args=(tmp_path,)) for _ in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "number").read_text() == "16"


def test_who_has_lost_it_removes_and_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lease.hold(tmp_path, 0) as token:
        write(tmp_path, ELSEWHERE)
        monkeypatch.setenv(lease.TOKEN, token)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=r"was taken over by process \d+ on other-host"):
            lease.check(tmp_path)
        failure.tell(tmp_path, "timed out", final=True)  # it would end the other trainer's ranks
    assert [path.name for path in tmp_path.iterdir()] == [lease.NAME]
    assert lease.read(tmp_path)[0] == ELSEWHERE


def lose_it(job: Job, other: Job) -> int:
    """What the launcher does whose machine stood still while another one trained: exit status 1 of its ranks."""

    def stand_still(*_: object) -> int:
        write(job.run, ELSEWHERE)
        run_job(other)
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "supervise_torchrun", stand_still)
        return launch.launch(job, launch.Place(), None, 0)


@pytest.mark.parametrize("lr", [RECIPE.lr, 1e-2], ids=["the same", "of another recipe"])
def test_who_wakes_when_another_has_finished_a_training_ends_well(
    lr: float, checkpoint: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Snakemake removes the outputs of a job that fails, and they are the other's."""
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(RECIPE, steps=2))
    other = replace(job, recipe=replace(job.recipe, lr=lr))
    assert lose_it(job, other) == 0
    assert other.is_finished() and "was taken over by process" in caplog.text


def test_who_wakes_while_it_hashes_its_inputs_removes_nothing(
    checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(RECIPE, steps=2))
    other = replace(job, recipe=replace(job.recipe, lr=1e-2))

    def stand_still(self: Job) -> Job:
        monkeypatch.undo()
        write(job.run, ELSEWHERE)
        run_job(other)
        return self.with_inputs()

    monkeypatch.setattr(Job, "with_inputs", stand_still)
    assert launch.launch(job, launch.Place(), None, 0) == 0
    assert other.is_finished()


def test_who_wakes_while_another_trains_fails(checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    job = make_job(checkpoint, dataset, tmp_path / "run", replace(RECIPE, steps=2))
    with pytest.raises(UserError, match=r"was taken over by process .* ends without saving"):
        lose_it(job, replace(job, exit_at_step=1))
    assert lease.read(job.run)[0] == ELSEWHERE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_one_that_waits_can_be_stopped(number: signal.Signals, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
    arguments = finetune_arguments(checkpoint, dataset, tmp_path)
    (tmp_path / "run").mkdir()
    holder = replace(HERE, pid=os.getpid(), started=started(os.getpid()))
    write(tmp_path / "run", holder)
    waiting = subprocess.Popen([*LLMPIPE, *arguments], stderr=subprocess.PIPE, text=True)
    assert waiting.stderr
    while "is being trained by" not in (line := waiting.stderr.readline()):
        assert line, "it ended"
    waiting.send_signal(number)
    said = waiting.communicate()[1]
    assert waiting.returncode == 75 and "before there was anything to save" in said, said
    assert lease.read(tmp_path / "run")[0] == holder


ON_MACHINE = """
import sys
from llmpipe.train import lease
lease.HEARTBEAT, lease.STALE, lease.POLL = 0.2, 3.0, 0.2
lease.this_machine = lambda name=sys.argv.pop(): name
from llmpipe.cli import main
main()
"""


def on_machine(name: str, arguments: list[str]) -> "subprocess.Popen[str]":
    """llmpipe on a machine of another name, which neither file locks nor process numbers reach."""
    return subprocess.Popen([sys.executable, "-c", ON_MACHINE, *arguments, name], stderr=subprocess.PIPE, text=True)


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def test_one_that_stood_still_and_was_given_up_saves_nothing_when_it_wakes(
    checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    arguments = finetune_arguments(checkpoint, dataset, tmp_path)
    run = tmp_path / "run"
    first = on_machine("a", arguments)
    wait_for_step(run, 12)
    frozen = [*processes_of(run)]
    assert len(frozen) == 4  # launcher, torchrun, two ranks
    signal_all(frozen, signal.SIGSTOP)

    second = on_machine("b", arguments)
    while "resumed after step" not in (run / "log.txt").read_text():
        assert second.poll() is None, second.communicate()
        time.sleep(0.01)
    signal_all(frozen, signal.SIGCONT)

    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert "taking over from process" in said
    said = first.communicate()[1]
    assert first.returncode in (0, 1), said  # 0 where the other one had finished by then, see above
    assert "was taken over" in said and "without saving" in said
    assert_trained_alike(run, train_undisturbed(arguments, tmp_path / "undisturbed"))
    assert not (run / failure.NAME).exists() and not (run / lease.NAME).exists()

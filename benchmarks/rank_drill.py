"""Faults of all kinds in one training by `llmpipe finetune`; its weights are bit for bit those of an undisturbed one.

    python benchmarks/rank_drill.py DIRECTORY [--ranks 8] [--kills 20] [--in-saves 5] [--seed 0] [--more]

Ranks are killed with kill -9, drawn at random, at random moments, some of them while a checkpoint is being written.
--more: also ranks killed again while they start and resume, a rank that is stopped (SIGSTOP) and so hangs, a checkpoint
for which one rank finds no room (its files may not grow, by its own resource limit), a flipped byte in the newest
checkpoint before another kill, and a kill while the trained weights are published.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from finetune_inputs import TINY, make_data, make_model
from safetensors.torch import load_file

from llmpipe.checkpoint import manifest
from llmpipe.config import parse_split
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.loop import train
from llmpipe.yaml_file import load

SAVE_EVERY, MICRO_BATCH, SPLIT = 3, 2, "98,1,1"
PATIENCE = 600.0
"""Seconds in which whatever is waited for has to happen."""
STARTING_SECONDS = 3.0
"""For each rank: within as many they start and resume, where there are two cores."""


def make_inputs(folder: Path, steps: int) -> None:
    """A random model with a card that lets it train, documents, a recipe."""
    make_model(folder / "model", TINY, torch.float32)
    digest = manifest.read(folder / "model").digest
    card = {"verdict": "pass", "subject": {"path": str(folder / "model"), "digest": digest}, "checks": []}
    (folder / "verify.json").write_text(json.dumps(card))
    make_data(folder / "data", TINY.vocab, 100_000, document=30)
    (folder / "recipe.yaml").write_text(
        f"{{seq_len: 32, global_batch: 16, steps: {steps}, lr: 1e-3, precision: fp32, save_every: {SAVE_EVERY}}}"
    )


def finetune(folder: Path, run: str, ranks: int, restarts: int) -> "subprocess.Popen[bytes]":
    """`llmpipe finetune` in TP2 and as much DP."""
    command = [
        sys.executable, "-m", "llmpipe", "finetune", folder / "recipe.yaml", "--model", folder / "model",
        "--data", folder / "data", "--output", folder / run, "--tp", "2", "--gpus-per-node", str(ranks),
        "--micro-batch", str(MICRO_BATCH), "--split", SPLIT, "--device", "cpu",
        "--threads", str(ranks), "--restarts", str(restarts), "--timeout-minutes", "0.5",
    ]  # fmt: skip
    return subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)


def train_undisturbed(folder: Path, ranks: int) -> None:
    """The same in forked processes, by no launcher."""
    layout = Layout(tp=2, micro_batch=MICRO_BATCH, gpus_per_node=ranks, device="cpu").resolved()
    (folder / "undisturbed").mkdir()
    job = Job(
        recipe=load(Recipe, folder / "recipe.yaml"), layout=layout, model=str(folder / "model"),
        data={str(folder / "data"): 1.0}, split=parse_split(SPLIT), output=str(folder / "undisturbed"),
    )  # fmt: skip
    run_ranks(train, ranks, job)


class Training:
    """A training that is under way."""

    def __init__(self, process: "subprocess.Popen[bytes]", run: Path):
        self.process, self.run = process, run

    def until(self, happened: Callable[[], bool], what: str, pause: float = 0.002) -> None:
        """Wait; SystemExit if the training ends before, or it takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{what} did not happen: exit status {self.process.poll()}")
            time.sleep(pause)

    @property
    def steps(self) -> int:
        live = self.run / "live.jsonl"
        return live.read_bytes().count(b"\n") if live.exists() else 0

    @property
    def attempts(self) -> int:
        """Those that went on from a checkpoint."""
        return (self.run / "log.txt").read_text().count("resumed after step")

    def rank(self, number: int) -> int | None:
        """The process of a rank."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                of_run = f"{self.run}/job.json".encode() in (path / "cmdline").read_bytes().split(b"\0")
                if of_run and f"RANK={number}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    return int(path.name)
            except OSError:
                continue
        return None

    def pid(self, number: int) -> int:
        """The process of a rank that is there."""
        pid = self.rank(number)
        assert pid is not None, f"rank {number} is not there"
        return pid

    def published(self) -> list[Path]:
        """The checkpoints that are whole, the newest last."""
        return sorted(path.parent for path in self.run.glob("checkpoints/*/step-*/manifest.json"))

    def being_written(self) -> set[tuple[str, int]]:
        """The names of the others, and when they last got a file: killed attempts leave some."""
        found = [path for path in self.run.glob("checkpoints/*/step-*") if not (path / "manifest.json").exists()]
        return {(path.name, path.stat().st_mtime_ns) for path in found if path.exists()}

    def step_on(self, steps: int) -> None:
        """Wait until a new attempt, or this one, has done so many steps more."""
        before = self.steps
        self.until(lambda: self.steps > before + steps - 1, f"{steps} steps after step {before}")


@contextmanager
def no_room(pid: int) -> Iterator[None]:
    """A process's files may not grow."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def kill(training: Training, number: int, in_save: bool, draw: random.Random) -> tuple[str, bool]:
    """kill -9 of a rank; where it struck, and whether that was while a checkpoint was written."""
    training.step_on(draw.randint(1, SAVE_EVERY))
    pid, before = training.pid(number), training.being_written()
    if in_save:
        training.until(lambda: bool(training.being_written() - before), "a save", 0.0)
    else:
        time.sleep(draw.uniform(0, 0.05))
    os.kill(pid, signal.SIGKILL)
    begun = [name for name, _ in training.being_written() - before]
    training.until(lambda: training.rank(number) != pid, f"the end of rank {number}")
    where = f"while {begun[0]} was written" if begun else f"after step {training.steps}"
    return f"rank {number} killed {where}", bool(begun)


def kill_again(training: Training, ranks: int, draw: random.Random) -> str:
    """A rank is killed, and then one of the attempt that follows, which starts, resumes or goes on."""
    training.step_on(1)
    before, number = training.attempts, draw.randrange(ranks)
    os.kill(pid := training.pid(number), signal.SIGKILL)
    training.until(lambda: training.rank(number) not in (pid, None), f"another start of rank {number}")
    seconds = draw.uniform(0, STARTING_SECONDS * ranks)
    time.sleep(seconds)
    resumed = training.attempts > before
    os.kill(pid := training.pid(number), signal.SIGKILL)
    training.until(lambda: training.rank(number) != pid, f"the end of rank {number}")
    return f"rank {number} killed, again after {seconds:.0f} s, {'' if resumed else 'not yet '}resumed"


def kill_at_end(training: Training, number: int) -> str:
    """A rank is killed while the trained weights are written."""
    training.step_on(1)
    pid = training.pid(number)
    training.until((training.run / ".weights.part").exists, "publishing", 0.0)
    os.kill(pid, signal.SIGKILL)
    return f"rank {number} killed while the weights were published"


def flip(training: Training, number: int, draw: random.Random) -> str:
    """A byte of the newest checkpoint changes, and a rank is killed at once: it is gone on from the one before."""
    for _ in range(5):
        training.step_on(SAVE_EVERY)
        training.until(lambda: len(training.published()) > 1, "a second checkpoint")
        pid, newest = training.pid(number), training.published()[-1]
        file = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
        damaged = bytearray(file.read_bytes())
        place = draw.randrange(len(damaged))
        damaged[place] ^= 1
        file.write_bytes(damaged)
        os.kill(pid, signal.SIGKILL)
        training.step_on(1)
        if f"not resumed from {newest}" in (training.run / "log.txt").read_text():
            return f"byte {place} of {newest.name}/{file.name} flipped, rank {number} killed, {newest.name} passed over"
    raise SystemExit("each time a newer checkpoint was published before the kill")


def fill(training: Training, number: int) -> str:
    """One rank finds no room for its part of a checkpoint; training goes on."""
    log = training.run / "log.txt"
    before = log.read_text().count("not saved")
    training.step_on(1)
    with no_room(training.pid(number)):
        training.until(lambda: log.read_text().count("not saved") > before, "a save that fails")
    said = next(line for line in reversed(log.read_text().splitlines()) if "not saved" in line)
    return f"no room for rank {number}: {said[said.index('step') :][:60]}…"


def stop(training: Training, number: int) -> str:
    """SIGSTOP: a rank hangs until the others give it up."""
    training.step_on(1)
    pid, start = training.pid(number), time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    training.until(lambda: training.rank(number) != pid, "the end of a rank that hangs", 0.1)
    return f"rank {number} stopped, given up after {time.monotonic() - start:.0f} s"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name} {k}": v for p in (run / "weights").glob("*.safetensors") for k, v in load_file(p).items()}


def drill(folder: Path, ranks: int, kills: int, in_saves: int, seed: int, more: bool = False) -> list[str]:
    """All of it, in lines; SystemExit at the first thing that is not as it should be."""
    draw, lines, steps = random.Random(seed), list[str](), (kills + in_saves + 12 * more + 1) * 2 * SAVE_EVERY
    make_inputs(folder, steps)
    train_undisturbed(folder, ranks)
    start = time.monotonic()
    training = Training(finetune(folder, "run", ranks, 3 * kills + 20), folder / "run")

    def tell(line: str) -> None:
        lines.append(line)
        print(line, file=sys.stderr, flush=True)

    left, in_save_each = draw.sample([True] * in_saves + [False] * (kills - in_saves), kills), list[bool]()
    while left:
        said, in_save = kill(training, draw.randrange(ranks), left[0], draw)
        tell(said)
        in_save_each.append(in_save)
        left = left[1:] if in_save or not left[0] else left  # too late: again
    if more:
        for _ in range(5):
            tell(kill_again(training, ranks, draw))
        tell(flip(training, draw.randrange(ranks), draw))
        tell(fill(training, draw.randrange(1, ranks)))
        tell(stop(training, draw.randrange(ranks)))
        tell(kill_at_end(training, draw.randrange(ranks)))
    if code := training.process.wait():
        raise SystemExit(f"after {lines}, it ended with {code}")
    ours, expected = weights(folder / "run"), weights(folder / "undisturbed")
    if ours.keys() != expected.keys() or not all(torch.equal(ours[key], expected[key]) for key in expected):
        raise SystemExit(f"after {lines}, the weights are others")
    told = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    if told != list(range(1, steps + 1)):
        raise SystemExit(f"after {lines}, the metrics have the steps {told}")
    if (folder / "run/failure.json").exists():
        raise SystemExit(f"after {lines}, it still tells of a failure: {(folder / 'run/failure.json').read_text()}")
    lasted = f"{len(in_save_each)} kills, {sum(in_save_each)} in saves, {training.attempts} times resumed from a"
    lasted += f" checkpoint, in {time.monotonic() - start:.0f} s"
    return [*lines, f"{lasted}; {steps} steps, each once, and the weights of an undisturbed run, bit for bit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in-saves", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true")
    given = parser.parse_args()
    given.directory.mkdir(parents=True)
    print(drill(given.directory, given.ranks, given.kills, given.in_saves, given.seed, given.more)[-1])


if __name__ == "__main__":
    main()

"""A project folder made from demo/, and the training of its two-node run through `snakemake --profile slurm`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from private_slurm import PrivateSlurm, wait_for
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RUN = "tiny_llama_2nodes"
TARGET = f"finetune_{RUN}"
RECORD = f"results/runs/{RUN}/run.json"
"""As a target: the training alone, without MLflow."""
STEPS, SAVE_EVERY = 60, 5
PATIENCE = 900.0
"""Seconds in which whatever is waited for has to happen, on a busy machine too."""


def make_project(folder: Path) -> None:
    """The demo with a shorter recipe; beside it, as beside demo/, stand workflow/ and slurm/."""
    folder.parent.mkdir(exist_ok=True)
    for name in ("workflow", "slurm"):
        (folder.parent / name).symlink_to(ROOT / name)
    kept_out = shutil.ignore_patterns("results", "logs", "weights", "data", "by_hand", "scratch", ".*", "mlflow.db")
    shutil.copytree(ROOT / "demo", folder, symlinks=True, ignore=kept_out)
    recipe = folder / "config/recipes/tiny_llama.yaml"
    text = recipe.read_text()
    for key, value in (("steps", STEPS), ("save_every", SAVE_EVERY)):
        text, found = re.subn(rf"^{key}: \d+", f"{key}: {value}", text, flags=re.MULTILINE)
        assert found == 1, f"{recipe}: one {key}: is expected"
    recipe.write_text(text)


class DrillProject:
    """A project, its run, and the Snakemake that trains it."""

    def __init__(self, folder: Path, slurm: PrivateSlurm):
        self.folder, self.slurm = folder, slurm
        self.run = folder / "results/runs" / RUN
        self.process: subprocess.Popen[bytes] | None = None

    def copy(self, name: str) -> "DrillProject":
        """Another project with all that comes before the training."""
        other = self.folder.with_name(name)
        shutil.copytree(self.folder, other, symlinks=True)
        for made in ("results/runs", "logs", ".snakemake"):
            shutil.rmtree(other / made)
        (other / "snakemake.txt").unlink()
        return DrillProject(other, self.slurm)

    def snakemake(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start Snakemake; what it says is added to snakemake.txt."""
        quick = Path(__file__).with_name("quick_snakemake.py")
        cache = {"XDG_CACHE_HOME": str(self.slurm.folder / "cache"), "OMP_NUM_THREADS": "1"}
        with (self.folder / "snakemake.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, quick, "--profile", "slurm", *arguments],
                cwd=self.folder, env=self.slurm.environment | cache, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def start(self, *arguments: str) -> None:
        """Start the training of the run."""
        self.process = self.snakemake(*(arguments or [RECORD]))

    def until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait; AssertionError, with what was said, if Snakemake ends before, or it takes too long."""
        process = self.process
        assert process

        def told() -> bool:
            assert process.poll() is None, f"before {what}, Snakemake ended with {process.poll()}:\n{self.story()}"
            return happened()

        wait_for(told, what, PATIENCE)

    def finish(self, expected: int = 0) -> None:
        """Wait for the end of Snakemake."""
        assert self.process
        assert self.process.wait(PATIENCE) == expected, self.story()

    def kill_snakemake(self) -> None:
        """kill -9, if it runs."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def story(self) -> str:
        """The ends of what Snakemake, the jobs and the training said."""
        logs = [*self.folder.glob("snakemake.txt"), *self.run.glob("log.txt"), *self.folder.glob("logs/[fs]*/**/*.log")]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def until_saved(self, after: int = 0) -> int:
        """Wait until there is a checkpoint of a later step than `after`, and training is past it; its step."""
        self.until(lambda: self.saved > after, f"a checkpoint after step {after}")
        saved = self.saved
        self.until(lambda: self.steps > saved, f"a step after {saved}")
        return saved

    def until_resumed(self, times: int = 1) -> int:
        """Wait until the training has been resumed so often; the step after which it went on."""
        self.until(lambda: len(self.resumed) >= times, f"resuming for the {times}. time")
        return self.resumed[-1]

    @property
    def saved(self) -> int:
        """The step of the newest whole checkpoint."""
        manifests = self.run.glob("checkpoints/*/step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in manifests), default=0)

    @property
    def steps(self) -> int:
        """How many were done."""
        try:
            return (self.run / "live.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    @property
    def resumed(self) -> list[int]:
        """After which steps the training went on, each time that it was resumed."""
        try:
            return [int(step) for step in re.findall(r"resumed after step (\d+)", (self.run / "log.txt").read_text())]
        except OSError:
            return []

    @property
    def trainings(self) -> list[tuple[str, str, list[str]]]:
        """The id, state and nodes of each job of this run that has not ended, in the order of their submission."""
        found = [(job, state, nodes) for job, state, nodes, comment in self.slurm.jobs() if RUN in comment]
        return [(job, state, self._names(nodes)) for job, state, nodes in sorted(found, key=lambda told: int(told[0]))]

    def _names(self, nodes: str) -> list[str]:
        return self.slurm.call("scontrol", "show", "hostnames", nodes).split() if nodes else []

    def training(self) -> tuple[str, list[str]]:
        """The id and nodes of the one job that trains."""
        running = [(job, nodes) for job, state, nodes in self.trainings if state == "RUNNING"]
        assert len(running) == 1, f"{self.trainings}\n{self.story()}"
        return running[0]

    def until_asked_to_stop(self) -> None:
        self.until((self.run / "stop").exists, "the training being asked to stop")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the training where it is, by one rank that stands still."""
        ranks = self.slurm.processes("RANK=3")
        assert len(ranks) == 1, self.story()
        os.kill(ranks[0], signal.SIGSTOP)
        yield
        os.kill(ranks[0], signal.SIGCONT)

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{p.name} {k}": v for p in (self.run / "weights").glob("*.safetensors") for k, v in load_file(p).items()
        }

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours: DrillProject, undisturbed: DrillProject) -> None:
    """The same weights, bit for bit, the same losses, each step once; and nothing of the training is left running."""
    expected, found = undisturbed.weights(), ours.weights()
    assert found.keys() == expected.keys() and len(found) > 0, ours.story()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different, f"{different}\n{ours.story()}"
    assert [line["step"] for line in ours.metrics()] == list(range(1, STEPS + 1)), ours.story()
    assert [line["loss"] for line in ours.metrics()] == [line["loss"] for line in undisturbed.metrics()]
    wait_for(lambda: not ours.trainings, f"the end of all jobs, {ours.trainings}")
    wait_for(lambda: not _job_processes(ours), "the end of all processes of jobs")


def _job_processes(project: DrillProject) -> list[int]:
    """The launchers and ranks of its run."""
    found = list[int]()
    for pid in project.slurm.processes():
        try:
            found += [pid] if f"runs/{RUN}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes() else []
        except OSError:
            continue
    return found

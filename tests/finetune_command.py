"""`llmpipe finetune` as a process of its own, for tests that stop, kill and take over trainings."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from llmpipe.checkpoint import manifest
from llmpipe.config import parse_split
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.loop import train
from llmpipe.verify import card
from llmpipe.yaml_file import load

LLMPIPE = [sys.executable, "-m", "llmpipe"]


def finetune_arguments(checkpoint: Path, dataset: Path, folder: Path, steps: int = 60) -> list[str]:
    """Of two TP processes into folder/run, with a card that lets the training start."""
    model = folder / "checkpoint"
    model.symlink_to(checkpoint)
    digest = manifest.read(checkpoint).digest
    passed = {"verdict": "pass", "subject": {"path": str(model), "digest": digest}, "checks": []}
    (folder / "verify.json").write_text(json.dumps(passed))
    assert card.require_card(model) is None
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{{seq_len: 32, global_batch: 8, steps: {steps}, lr: 1e-3, precision: fp32, save_every: 10}}")
    return [
        "finetune", str(recipe), "--model", str(model), "--data", str(dataset), "--output", str(folder / "run"),
        "--tp", "2", "--gpus-per-node", "2", "--micro-batch", "4", "--device", "cpu", "--threads", "2",
    ]  # fmt: skip


def train_undisturbed(arguments: list[str], run: Path) -> Path:
    """What `finetune_arguments` train, into another run folder: in forked ranks, by no launcher, which costs less."""
    option = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    run.mkdir()
    job = Job(
        recipe=load(Recipe, Path(arguments[1])),
        layout=Layout(tp=2, gpus_per_node=2, micro_batch=4, device="cpu").resolved(),
        model=option["--model"], data={option["--data"]: 1.0}, split=parse_split("969,30,1"), output=str(run),
    )  # fmt: skip
    run_ranks(train, job.layout.processes, job)
    return run


def num_steps(run: Path) -> int:
    """How many lines the metrics have."""
    live = run / "live.jsonl"
    return live.read_bytes().count(b"\n") if live.exists() else 0


def wait_for_step(run: Path, step: int) -> None:
    """Until the metrics have this many lines; three minutes at most."""
    for _ in range(1800):
        if num_steps(run) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {run}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The published ones."""
    return {f"{p.name}/{k}": v for p in (run / "weights").glob("*.safetensors") for k, v in load_file(p).items()}


def assert_trained_alike(run: Path, undisturbed: Path) -> None:
    """The same weights to the bit, and each step once."""
    ours, expected = weights(run), weights(undisturbed)
    assert ours.keys() == expected.keys() and ours
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    steps = [
        [json.loads(line)["step"] for line in (of / "metrics.jsonl").read_text().splitlines()]
        for of in (run, undisturbed)
    ]
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))


def processes_of(run: Path) -> dict[int, str]:
    """Launchers, torchruns and ranks of a run folder, and what started them; but for those that wait to be reaped."""
    lines = subprocess.check_output(["ps", "-ww", "-eo", "pid,stat,args"], text=True).splitlines()[1:]
    fields = [line.split(None, 2) for line in lines]
    of_run = re.compile(rf"{re.escape(str(run))}(/job\.json)?( |$)")
    return {int(pid): args for pid, state, args in fields if of_run.search(args) and state[0] != "Z"}


def wait_for_torchrun(run: Path) -> None:
    """Until the launcher has started it, and so takes signals; three minutes at most."""
    for _ in range(1800):
        if any("llmpipe.train.agent" in command for command in processes_of(run).values()):
            return
        time.sleep(0.1)
    raise AssertionError(f"no torchrun for {run}")


def wait_until_no_rank_lives(run: Path) -> None:
    """kill -9 of the launcher ends its torchrun and ranks; half a minute at most."""
    for _ in range(300):
        if not processes_of(run):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes of {run} live on")

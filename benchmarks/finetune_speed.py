"""Tokens a second of llmpipe's engine beside others on the CPU: one process each, all in turns, medians.

    python benchmarks/finetune_speed.py WORK [--precision fp32 mixed bf16] [--peer litgpt PEER/bin/python]
        [--turns 5] [--turn 2] [--threads 1] [--hidden 512 --layers 8 --seq 512 ...]
    python benchmarks/finetune_speed.py WORK --scaling

A small Llama with random weights; the workers are those of finetune_peers.py, which says what they are. Each turn is
`--turn` whole steps of one worker while the others wait; the first turn of each warms it up and is not counted. Seconds
are of CPU, user and system, which a busy machine changes least; by the clock only where the table says so. `loss` is
how far the losses of all steps are from hf_loop's at most, relative: the same arithmetic, or it would be no comparison.
`outside` is the engine's share of time outside forward, backward and optimizer (clipping included); goal 3 %.

PEER, an environment of its own:

    python3 -m venv PEER; PEER/bin/pip install torch==2.13.0 numpy safetensors litgpt==0.5.13

--scaling: the engine alone, its CPU seconds and memory by sequence length, layers, and ranks, which share the cores.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from finetune_inputs import Settings, job_of, make_batches, make_data, make_model
from finetune_peers import most_memory

from llmpipe.data.batches.loader import Loader
from llmpipe.families import Shape
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.train import loop
from llmpipe.train.job import Job

HERE = Path(__file__).parent
OURS = ("engine", "own_loop", "hf_loop", "hf_trainer")
REFERENCE = "hf_loop"


class Worker:
    """A process that trains when it is told to."""

    def __init__(self, name: str, python: str, settings: Path, threads: int):
        self.name, self.turns = name, []
        self.end: dict[str, Any] = {}
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],  # Trainer takes all
        }
        self.log = settings.with_name(f"{name}.log").open("w+")
        line = [python, str(HERE / "finetune_peers.py"), name, str(settings)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(line, text=True, env=environment, **pipes)  # type: ignore[call-overload]

    def take_turn(self) -> None:
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        self.turns.append(self._hear())

    def finish(self) -> None:
        self.end = self._hear()
        self.process.communicate()
        self.log.close()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def median(self, key: str) -> float:
        return statistics.median(turn[key] for turn in self.turns[1:] or self.turns)


def paired(settings: Settings, pythons: dict[str, str], threads: int) -> list[Worker]:
    """All workers, after their turns."""
    file = settings.write(Path(settings.work) / "settings.json")
    workers = [Worker(name, python, file, threads) for name, python in pythons.items()]
    for number in range(settings.turns):
        for worker in workers:
            worker.take_turn()
            print(f"{number} {worker.name} {worker.turns[-1]}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.finish()
    return workers


def table(workers: list[Worker], settings: Settings) -> list[str]:
    """Markdown; a row for each worker."""
    engine, tokens = workers[0], settings.turn * settings.tokens_per_step
    reference = next(worker for worker in workers if worker.name == REFERENCE)
    columns = ["", "CPU s a step", "tokens a CPU s", "engine's rate / its", "least, most", "tokens/s by the clock"]
    lines = [f"| {' | '.join([*columns, 'outside', 'MB resident', 'loss'])} |", "|---" * 9 + "|"]
    for worker in workers:
        cpu, wall = worker.median("cpu"), worker.median("wall")
        ratios = [theirs["cpu"] / ours["cpu"] for ours, theirs in zip(engine.turns, worker.turns, strict=True)][1:]
        outside = f"{1 - worker.median('inside') / cpu:.1%}" if worker is engine else ""
        pairs = zip(worker.end["losses"], reference.end["losses"], strict=False)
        loss = max(abs(a / b - 1) for a, b in pairs)
        lines.append(
            f"| {worker.name} | {cpu / settings.turn:.3f} | {tokens / cpu:,.0f} | {statistics.median(ratios):.3f}"
            f" | {min(ratios):.2f}, {max(ratios):.2f} | {tokens / wall:,.0f} | {outside}"
            f" | {worker.end['memory'] / 1e6:,.0f} | {loss:.0e} |"
        )
    return lines


def shape_of(options: argparse.Namespace) -> Shape:
    heads = max(1, options.hidden // 64)
    return Shape(
        family="llama", num_layers=options.layers, hidden=options.hidden, num_heads=heads, num_kv_heads=heads,
        head_dim=options.hidden // heads, ffn=options.ffn, vocab=options.vocab, max_positions=4096, norm_eps=1e-5,
        rope_theta=10000.0,
    )  # fmt: skip


def prepare(work: Path, shape: Shape, settings: Settings, dtype: torch.dtype = torch.float32) -> None:
    """Model, data and batches in WORK."""
    make_model(work / "model", shape, dtype)
    make_data(work / "data", shape.vocab, (settings.steps + 2) * settings.tokens_per_step, 8 * settings.seq_len)
    make_batches(settings)


def compare(options: argparse.Namespace) -> None:
    for precision in options.precision:
        work = options.work / precision
        settings = Settings(
            str(work),
            options.seq,
            options.micro_batch,
            options.global_batch,
            options.turn,
            options.turns + 1,
            precision,
        )
        prepare(work, shape_of(options), settings)
        pythons = {name: sys.executable for name in OURS if (name, precision) != ("own_loop", "mixed")}
        pythons |= dict(options.peer)
        print(
            f"\n### {precision}\n", *table(paired(settings, pythons, options.threads), settings), sep="\n", flush=True
        )


def scaling(options: argparse.Namespace) -> None:
    """The table of the engine alone."""
    base = {"layers": options.layers, "seq": options.seq, "layout": {}}
    rows = [{}, *({"seq": options.seq * n // 4} for n in (1, 2, 8, 16))]
    rows += [{"layers": options.layers * n // 4} for n in (1, 2, 8)]
    rows += [{"layout": {name: 2}} for name in ("dp", "tp", "pp", "cp")]
    rows += [{"layout": {"tp": 2, "dp": 2}}, {"layout": {"tp": 2, "pp": 2}}]
    print("| seq | layers | ranks | CPU s a step, all ranks | tokens a CPU s | MB resident, fullest rank |")
    print("|---|---|---|---|---|---|")
    for given in rows:
        of_row = argparse.Namespace(**vars(options) | {key: (base | given)[key] for key in ("layers", "seq")})
        settings = Settings(
            str(options.work / f"{of_row.layers}-{of_row.seq}"), of_row.seq, 1, 2, options.turn, 2, options.precision[0]
        )
        prepare(Path(settings.work), shape_of(of_row), settings)
        layout = (base | given)["layout"]
        cpu, memory = cost(settings, layout)
        ranks = " x ".join(f"{name} {size}" for name, size in layout.items()) or "1"
        rate = settings.tokens_per_step / cpu
        print(
            f"| {of_row.seq} | {of_row.layers} | {ranks} | {cpu:.2f} | {rate:,.0f} | {memory / 1e6:,.0f} |", flush=True
        )


def cost(settings: Settings, layout: dict[str, int]) -> tuple[float, int]:
    """A step's CPU seconds, the median, of all ranks together, and the fullest rank's peak."""
    made = Layout(device="cpu", gpus_per_node=math.prod(layout.values()), **layout).resolved()
    with tempfile.TemporaryDirectory(dir=settings.work) as run:
        found = run_ranks(costs, made.processes, job_of(settings, Path(run), made))
    return sum(statistics.median(steps) for steps, _ in found), max(memory for _, memory in found)


def costs(job: Job) -> tuple[list[float], int]:
    """On a rank: the CPU seconds of each step but the first, and its peak."""
    times, next_batch = [], Loader.step

    class End(Exception):
        pass

    def asked(loader: Loader, number: int) -> Any:
        times.append(time.process_time())
        if len(times) == job.recipe.steps:
            raise End
        return next_batch(loader, number)

    Loader.step = asked
    with contextlib.suppress(End):
        loop.train(job)
    return [after - before for before, after in pairwise(times[1:])], most_memory("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--precision", nargs="+", default=["fp32", "mixed", "bf16"])
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("NAME", "PYTHON"))
    parser.add_argument("--scaling", action="store_true")
    sizes = {"turns": 5, "turn": 2, "threads": 1, "hidden": 512, "layers": 8, "ffn": 1376, "vocab": 32000, "seq": 512}
    for name, value in (sizes | {"micro_batch": 2, "global_batch": 2}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args()
    options.work = options.work.resolve()
    (scaling if options.scaling else compare)(options)


if __name__ == "__main__":
    main()

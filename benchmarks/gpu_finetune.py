"""Llama-2-7B and Llama-3-8B shapes on one GPU: tokens a second, MFU, memory; transformers' Trainer beside llmpipe.

    python benchmarks/gpu_finetune.py WORK --shape llama2_7b llama3_8b [--worker engine hf_trainer]
        [--precision bf16] [--seq 4096] [--micro-batch 1] [--global-batch 8] [--recompute off selective full]
        [--recompute-every 1] [--no-compile] [--turn 3] [--turns 3] [--document 1024] [--no-isolate]
    python benchmarks/gpu_finetune.py WORK --shape tiny --device cpu

Random weights as a checkpoint in WORK (13 to 16 GB), a dataset of random documents of --document tokens, rows of 4,096
packed from them by the engine's own loader, each document for itself, clipping on. The workers are those of
finetune_peers.py, one after the other, each in a process of its own; the first turn of --turn steps warms up and is not
counted. Trainer crosses documents (its kernel for packed ones is another package's), has fused AdamW, SDPA's flash
kernel, torch.compile, Liger's kernels where that package is installed, and gradient checkpointing where --recompute is
not off; --trainer-recompute and --trainer-micro-batch give it its own best.

MFU by both conventions of metrics.jsonl (llmpipe.train.metrics.flops_per_token) over the GPU's dense bf16 peak: full,
as most publish it, a token sees the whole row; causal, it sees half of it on average. Documents for themselves take
less than either counts: with --no-isolate, or --document 65536, which fills rows with one, MFU compares with what is
published. `held` is what lies in memory between steps.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from finetune_inputs import TINY, Settings, make_batches, make_data, make_model
from finetune_speed import Worker

from llmpipe.families import Shape, named_size
from llmpipe.train.metrics import flops_per_token, peak_flops

DTYPES = {"fp32": torch.float32, "mixed": torch.float32, "bf16": torch.bfloat16}


def machine(device: str) -> str:
    """What the numbers are of; SystemExit where the device is not there."""
    if device == "cpu":
        return f"the CPU, torch {torch.__version__}: no numbers of a GPU"
    if not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no GPU here: run this where there is one, or --shape tiny --device cpu to try it out"
        )
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    return f"{told or torch.cuda.get_device_name()}, torch {torch.__version__}"


def measure(name: str, settings: Settings) -> Worker:
    """A worker that has had its turns, one after the other."""
    worker = Worker(name, sys.executable, settings.write(Path(settings.work) / f"{name}.json"), threads=8)
    for _ in range(settings.turns):
        worker.take_turn()
        print(f"{name} {worker.turns[-1]}", file=sys.stderr, flush=True)
    worker.finish()
    return worker


def row(worker: Worker, shape: Shape, settings: Settings, peak: float) -> str:
    """A line of the table."""
    rate = settings.turn * settings.tokens_per_step / worker.median("wall")
    causal, full = (flops_per_token(shape, settings.seq_len, causal) * rate / peak for causal in (True, False))
    recompute = settings.recompute + (f", every {settings.recompute_every}." if settings.recompute == "full" else "")
    how = f"micro-batch {settings.micro_batch} of {settings.global_batch}, recompute {recompute}"
    held = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in worker.end["states"].items())
    return (
        f"| {worker.name} | {how}{', compiled' if settings.compile else ''} | {rate:,.0f} | {causal:.1%} | {full:.1%}"
        f" | {worker.end['memory'] / 1e9:.1f} | {held} |"
    )


def measure_shape(name: str, options: argparse.Namespace) -> None:
    shape, work = TINY if name == "tiny" else named_size(name), options.work / name
    settings = Settings(
        str(work), options.seq, options.micro_batch, options.global_batch, options.turn, options.turns + 1,
        options.precision, options.device, options.recompute, options.recompute_every, options.compile, options.isolate,
    )  # fmt: skip
    make_model(work / "model", shape, DTYPES[options.precision], options.device)
    make_data(work / "data", shape.vocab, (settings.steps + 2) * settings.tokens_per_step, options.document)
    make_batches(settings)
    of_trainer = replace(
        settings,
        micro_batch=options.trainer_micro_batch or options.micro_batch,
        recompute=options.trainer_recompute,
        recompute_every=1,
    )
    peak = peak_flops(torch.device(options.device), torch.bfloat16)
    print(f"\n### {name}, {options.precision}, rows of {options.seq} tokens; {machine(options.device)}\n")
    print("| | | tokens/s | MFU, causal | MFU, full | peak GB | held |\n|---|---|---|---|---|---|---|")
    for worker in options.worker:
        used = of_trainer if worker == "hf_trainer" else settings
        print(row(measure(worker, used), shape, used, peak), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", nargs="+", default=["llama2_7b", "llama3_8b"])
    parser.add_argument("--worker", nargs="+", default=["engine", "hf_trainer"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    for name, value in {"seq": 4096, "micro_batch": 1, "global_batch": 8, "recompute_every": 1}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    for name, value in {"turn": 3, "turns": 3, "document": 1024, "trainer_micro_batch": None}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--recompute", choices=["off", "selective", "full"], default="selective")
    parser.add_argument("--trainer-recompute", choices=["off", "full"], default="full")
    for name in ("compile", "isolate"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    options.work = options.work.resolve()
    machine(options.device)
    for shape in options.shape:
        measure_shape(shape, options)


if __name__ == "__main__":
    main()

"""torch, CUDA, NCCL and the GPUs, from what a probe says of torch and nvidia-smi of the machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmpipe.doctor.finding import GIB, Finding, mend, note, ok, told_by
from llmpipe.programs import output_of

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
"""The versions that llmpipe's tests are run with lie between these."""
QUERY = "name,driver_version,memory.used"
INSTALL = "https://pytorch.org/get-started/locally/"
AMPERE = (8, 0)
IDLE_MIB = 2000  # what driver and display take


@dataclass(frozen=True, slots=True)
class DriverGpu:
    """A GPU that the driver knows."""

    name: str
    driver: str
    used_mib: int
    """Memory that processes have now."""


def start_probe() -> "subprocess.Popen[str]":
    """torch takes seconds to import: other checks are made meanwhile."""
    command = [sys.executable, "-m", "llmpipe.doctor.torch_probe"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_probe(probe: "subprocess.Popen[str]", seconds: float) -> dict[str, Any] | Finding:
    """What torch says, or the finding that it says nothing."""
    try:
        told, error = output_of(probe, seconds)
    except subprocess.TimeoutExpired:
        advice = "run doctor again; if it stays so, the driver hangs: try nvidia-smi, and dmesg"
        return note("torch", f"could not be looked at in {seconds:.1g} s", advice)
    if probe.returncode:
        last = error.strip().splitlines()[-1:] or [f"status {probe.returncode}"]
        return mend("torch", f"cannot be imported: {last[0]}", f"install torch {_window()}: {INSTALL}")
    return json.loads(told.splitlines()[-1])


def gpus_of_driver() -> list[DriverGpu]:
    """What nvidia-smi says."""
    lines, _ = told_by("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    cells = [line.split(", ") for line in lines or []]
    return [DriverGpu(name, driver, int(used) if used.isdecimal() else 0) for name, driver, used in cells]


def torch_version(facts: dict[str, Any]) -> Iterator[Finding]:
    """Old enough and new enough."""
    found = tuple(map(int, re.findall(r"\d+", facts["torch"])[:2]))
    if found < OLDEST_TORCH:
        yield mend("torch", facts["torch"], f"llmpipe needs torch {_window()}: {INSTALL}")
    elif found > NEWEST_TORCH:
        yield note("torch", facts["torch"], f"newer than what llmpipe's tests are run with, {_window()}: run make test")
    else:
        yield ok("torch", facts["torch"])


def _window() -> str:
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TORCH, NEWEST_TORCH))
    return f"{oldest} to {newest}"


def cuda(facts: dict[str, Any], known: list[DriverGpu]) -> Iterator[Finding]:
    """Whether torch can use the GPUs that the driver knows, and which these are."""
    if facts["gpus"]:
        yield ok("CUDA", f"{facts['cuda']}, NCCL {facts['nccl'] or 'none'}")
        yield from (_gpu(number, gpu) for number, gpu in enumerate(facts["gpus"]))
        yield from _several(facts, known)
    elif known and os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield note("CUDA", f"CUDA_VISIBLE_DEVICES hides {_count(known)}", "unset it to use them")
    elif known and facts["cuda"] is None:
        advice = f"install a CUDA build: {INSTALL}"
        yield mend("CUDA", f"the machine has {_count(known)}, and this torch is built for the CPU alone", advice)
    elif known:
        found = f"torch cannot use {_count(known)}: {facts['error'] or 'it sees none'}"
        yield mend("CUDA", found, f"mend the driver ({known[0].driver}), or install a torch that it takes: {INSTALL}")
    else:
        yield note("CUDA", "no GPU here", "trainings take `device: cpu` in their layout: fine for the demo")


def _count(known: list[DriverGpu]) -> str:
    return f"{len(known)} GPU{'s' if len(known) > 1 else ''} ({known[0].name})"


def _gpu(number: int, gpu: dict[str, Any]) -> Finding:
    capability = ".".join(map(str, gpu["capability"]))
    found = f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.0f} GiB, compute capability {capability}"
    if tuple(gpu["capability"]) < AMPERE:
        return note(f"GPU {number}", found, "before Ampere: no bf16 and no flash kernel; take precision: fp16 or fp32")
    return ok(f"GPU {number}", found)


def _several(facts: dict[str, Any], known: list[DriverGpu]) -> Iterator[Finding]:
    """What matters of all of them together."""
    if len(facts["gpus"]) > 1 and not facts["nccl"]:
        yield mend("NCCL", "this torch has none", f"several GPUs need it: install a build with it, {INSTALL}")
    used = [
        f"GPU {number} {gpu.used_mib / 1024:.0f} GiB" for number, gpu in enumerate(known) if gpu.used_mib > IDLE_MIB
    ]
    if used:
        yield note("GPU memory", f"in use: {', '.join(used)}", "by another process, see nvidia-smi")


def attention(facts: dict[str, Any]) -> Iterator[Finding]:
    """Which way packed documents would be attended to."""
    if not facts["gpus"]:
        yield ok("attention", "on the CPU document by document")
        return
    lacking = [kind for kind, is_there in facts["varlen"].items() if not is_there]
    flex = f"; flex attention for {' and '.join(lacking)}, which it lacks in torch {facts['torch']}" if lacking else ""
    yield ok("attention", f"in bf16 and fp16 torch's variable-length flash kernel{flex}; in fp32 document by document")

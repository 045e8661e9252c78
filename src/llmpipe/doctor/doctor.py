"""All checks, in the order in which they are told."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

from llmpipe.background import in_background
from llmpipe.doctor import gpu, installed, machine, slurm, store
from llmpipe.doctor.finding import Finding, mend
from llmpipe.doctor.gpu import DriverGpu

SECONDS = 7.0


def examine(folder: Path, uri: str | None) -> list[Finding]:
    """What this machine can do. Whatever may hang is given up in time, and all is asked at once."""
    deadline, probe = time.monotonic() + SECONDS, gpu.start_probe()
    driver = in_background(gpu.gpus_of_driver)
    around = {
        "CPU": in_background(lambda: [*machine.cores()]),
        "disk": in_background(lambda: [*machine.disk(folder)]),
        "/dev/shm": in_background(lambda: [*machine.shared_memory()]),
        "locked memory": in_background(lambda: [*machine.locked_memory()]),
        "Slurm": in_background(lambda: [*slurm.slurm()]),
        "MLflow": in_background(lambda: [*store.store(uri)]),
    }
    here = [*installed.python(), *installed.packages(), *installed.helpers()]
    facts = gpu.read_probe(probe, deadline - time.monotonic())
    about_torch = [facts] if isinstance(facts, Finding) else [*torch_findings(facts, driver.result())]
    found = [findings(name, asked, deadline) for name, asked in around.items()]
    return [*here, *about_torch, *chain(*found)]


def findings(name: str, asked: "Future[list[Finding]]", deadline: float) -> list[Finding]:
    """What a check has found by then, or that it has not."""
    try:
        return asked.result(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        advice = "a file system that hangs, or a name server? df -h, and ls in this folder, show which"
        return [mend(name, f"no answer within {SECONDS:g} s", advice)]


def torch_findings(facts: dict[str, Any], known: list[DriverGpu]) -> Iterator[Finding]:
    """What the probe's facts mean."""
    yield from gpu.torch_version(facts)
    yield from gpu.cuda(facts, known)
    yield from gpu.attention(facts)
    yield from installed.apex(facts["apex"])

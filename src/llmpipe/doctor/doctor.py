"""All checks, in the order in which they are told."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from llmpipe.doctor import gpu, installed, machine, slurm, store
from llmpipe.doctor.finding import Finding
from llmpipe.doctor.gpu import DriverGpu

SECONDS = 7
Check = Callable[[], Iterator[Finding]]


def examine(folder: Path, uri: str | None) -> list[Finding]:
    """What this machine can do. Whatever may hang is given up in time, and all is asked at once."""
    deadline, probe = time.monotonic() + SECONDS, gpu.start_probe()
    around: list[Check] = [
        installed.python,
        installed.packages,
        installed.helpers,
        machine.cores,
        lambda: machine.disk(folder),
        machine.shared_memory,
        slurm.slurm,
        lambda: store.store(uri),
    ]
    with ThreadPoolExecutor() as pool:
        driver = pool.submit(gpu.gpus_of_driver)
        found = [*pool.map(lambda check: [*check()], around)]
        facts = gpu.read_probe(probe, deadline - time.monotonic())
    about_torch = [facts] if isinstance(facts, Finding) else [*torch_findings(facts, driver.result())]
    return [*chain(*found[:3]), *about_torch, *chain(*found[3:])]


def torch_findings(facts: dict[str, Any], known: list[DriverGpu]) -> Iterator[Finding]:
    """What the probe's facts mean."""
    yield from gpu.torch_version(facts)
    yield from gpu.cuda(facts, known)
    yield from gpu.attention(facts)
    yield from installed.apex(facts["apex"])

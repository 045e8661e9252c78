"""What a node is busy with while it trains: a line every 10 seconds in RUN/system/HOST.jsonl, by its launcher.

    {"time": 1767225600.0, "cpu_utilization_percentage": 97.0, "system_memory_usage_megabytes": 31000.0,
     "system_memory_usage_percentage": 24.1, "disk_available_megabytes": 820000.0, "network_receive_megabytes": 12.5,
     "network_transmit_megabytes": 11.9, "gpu_0_utilization_percentage": 99.0, "gpu_0_memory_usage_megabytes": 71000.0,
     "gpu_0_memory_usage_percentage": 87.2, "gpu_0_power_usage_watts": 640.0}

The names are those of MLflow's own system metrics. GPUs are those that nvidia-smi tells of; network counts from the
attempt's start; the disk is that of the run folder.
"""

import csv
import json
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from llmpipe.files import HOST

SECONDS = 10.0
FIRST_SECONDS = 2.0  # a short training has a line, too
_GPU = "index,utilization.gpu,memory.used,memory.total,power.draw"
log = logging.getLogger(__name__)


@contextmanager
def watched(run: Path) -> Iterator[None]:
    """Over a training on this node: a thread that writes the lines; nothing waits for it, and it stops nothing."""
    path = run / "system" / f"{os.environ.get('SLURMD_NODENAME', HOST)}.jsonl"
    ended = Event()
    Thread(target=_watch, args=(path, ended), name="system", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _watch(path: Path, ended: Event) -> None:
    if ended.wait(FIRST_SECONDS):  # nothing is imported while the ranks' processes are forked
        return
    import psutil

    psutil.cpu_percent()  # counts from here on
    start = _network()
    wait = FIRST_SECONDS
    while not ended.wait(wait):
        wait = SECONDS
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            line = {
                "time": round(time.time(), 3),
                **_sample(path.parent, *start),
                **_gpus(),
            }
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s is not written: %s", path, error)
            return


def _sample(folder: Path, received: int, sent: int) -> dict[str, float]:
    """Processor, memory, disk and network."""
    import psutil

    memory, (received_now, sent_now) = psutil.virtual_memory(), _network()
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_available_megabytes": shutil.disk_usage(folder).free / 1e6,
        "network_receive_megabytes": (received_now - received) / 1e6,
        "network_transmit_megabytes": (sent_now - sent) / 1e6,
    }
    return {name: round(value, 1) for name, value in values.items()}


def _network() -> tuple[int, int]:
    """Bytes received and sent since the machine started; none where there is no network."""
    import psutil

    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def _gpus() -> dict[str, float]:
    """Each GPU that this job may use; nothing without nvidia-smi."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = [f"--id={chosen}"] if chosen else []
    command = ["nvidia-smi", *which, f"--query-gpu={_GPU}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    return parse_gpus(done.stdout) if done.returncode == 0 else {}


def parse_gpus(table: str) -> dict[str, float]:
    """nvidia-smi's table of `_GPU`, megabytes for its MiB; what it does not know ("[N/A]") is left out."""
    found: dict[str, float] = {}
    for index, busy, used, total, power in csv.reader(table.splitlines(), skipinitialspace=True):
        known = {"utilization_percentage": busy, "memory_usage_megabytes": used, "power_usage_watts": power}
        values = {name: float(value) for name, value in known.items() if value.replace(".", "", 1).isdigit()}
        if "memory_usage_megabytes" in values:
            values["memory_usage_percentage"] = round(100 * float(used) / float(total), 1)
            values["memory_usage_megabytes"] = round(float(used) * 1.048576, 1)
        found |= {f"gpu_{index}_{name}": value for name, value in values.items()}
    return found

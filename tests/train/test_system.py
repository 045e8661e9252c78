"""What a node tells of itself while it trains."""

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from llmpipe.train import system


def test_lines_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "FIRST_SECONDS", 0.05)
    monkeypatch.setattr(system, "SECONDS", 0.05)
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    path = tmp_path / "system" / "node3.jsonl"
    with system.watched(tmp_path):
        for _ in range(600):
            if path.is_file() and path.read_text().count("\n") >= 2:
                break
            time.sleep(0.1)
    first, second, *_ = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["time"] < second["time"]
    total = psutil.virtual_memory().total / 1e6
    assert 0 < second["system_memory_usage_megabytes"] < total and 0 <= second["cpu_utilization_percentage"] <= 100
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 1e6
    assert second["disk_available_megabytes"] == pytest.approx(free, rel=0.1)


def test_a_full_disk_stops_the_lines_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "FIRST_SECONDS", 0.05)
    (tmp_path / "system").write_text("a file where the folder should be")
    told = []
    monkeypatch.setattr(system.log, "warning", lambda *what: told.append(what))
    with system.watched(tmp_path):
        for _ in range(600):
            if told:
                break
            time.sleep(0.1)
    assert len(told) == 1


def test_gpus_as_nvidia_smi_tells_them() -> None:
    """Two lines as an 8-GPU machine prints them; the second GPU does not know its power."""
    assert system.parse_gpus("0, 97, 71680, 81559, 640.12\n3, 0, 4, 81559, [N/A]\n") == {
        "gpu_0_utilization_percentage": 97.0, "gpu_0_memory_usage_megabytes": 75161.9,
        "gpu_0_memory_usage_percentage": 87.9, "gpu_0_power_usage_watts": 640.12,
        "gpu_3_utilization_percentage": 0.0, "gpu_3_memory_usage_megabytes": 4.2, "gpu_3_memory_usage_percentage": 0.0,
    }  # fmt: skip

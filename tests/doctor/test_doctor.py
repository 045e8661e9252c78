"""Each check on stand-ins: commands that print what nvidia-smi and sinfo print, a store of its own, facts by hand."""

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from packaging.requirements import Requirement

from llmpipe.cli import group
from llmpipe.cli.doctor import line
from llmpipe.doctor import doctor, gpu, installed, machine, torch_probe
from llmpipe.doctor.doctor import torch_findings
from llmpipe.doctor.finding import Finding, told_by
from llmpipe.doctor.slurm import slurm
from llmpipe.doctor.store import store

H100 = {"name": "NVIDIA H100", "capability": [9, 0], "memory_bytes": 80 << 30}
FACTS: dict[str, Any] = {
    "torch": "2.13.0+cu128", "cuda": "12.8", "nccl": "2.27.3", "gpus": [H100, H100], "error": "",
    "varlen": {"grouped queries": True, "windows": True}, "apex": None,
}  # fmt: skip
NO_GPU = FACTS | {"torch": "2.13.0+cpu", "cuda": None, "nccl": None, "gpus": []}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a shell script of a name on the PATH, where nothing else of the machine's cluster is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    return put


def verdicts(findings: Iterator[Finding] | list[Finding]) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in findings}


def test_gpus(command: Any) -> None:
    command("nvidia-smi", "echo 'NVIDIA H100, 570.86, 4'; echo 'NVIDIA H100, 570.86, 40000'; echo 'Odd, 1, [N/A]'")
    known = gpu.gpus_of_driver()
    assert [(one.name, one.driver, one.used_mib) for one in known[1:]] == [
        ("NVIDIA H100", "570.86", 40000),
        ("Odd", "1", 0),
    ]
    found = {finding.name: finding for finding in gpu.cuda(FACTS, known)}
    assert verdicts([*found.values()]) == {"CUDA": "ok", "GPU 0": "ok", "GPU 1": "ok", "GPU memory": "note"}
    assert found["CUDA"].found == "12.8, NCCL 2.27.3" and "80 GiB" in found["GPU 0"].found
    assert found["GPU memory"].found == "in use: GPU 1 39 GiB"


def test_gpus_that_torch_cannot_use_are_to_be_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    known = [gpu.DriverGpu("NVIDIA H100", "470.1", 0)]
    (built_for_cpu,) = gpu.cuda(NO_GPU, known)
    assert built_for_cpu.verdict == "mend" and "built for the CPU alone" in built_for_cpu.found
    (old,) = gpu.cuda(FACTS | {"gpus": [], "error": "driver too old"}, known)
    assert old.verdict == "mend" and "driver too old" in old.found and "470.1" in old.advice
    assert verdicts(gpu.cuda(NO_GPU, [])) == {"CUDA": "note"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert verdicts(gpu.cuda(NO_GPU, known)) == {"CUDA": "note"}
    assert verdicts(gpu.cuda(FACTS | {"nccl": None}, known))["NCCL"] == "mend"


def test_old_gpus_have_no_bf16() -> None:
    old = FACTS | {"gpus": [H100 | {"capability": [7, 0]}]}
    assert verdicts(gpu.cuda(old, [])) == {"CUDA": "ok", "GPU 0": "note"}


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("2.10.1", "mend"),
        ("2.11.0", "ok"),
        ("2.13.1+cu128", "ok"),
        ("2.14.0", "note"),
        ("1.13", "mend"),
        ("3.0.0a", "note"),
    ],
)
def test_the_window_of_torch(version: str, verdict: str) -> None:
    assert verdicts(gpu.torch_version(FACTS | {"torch": version})) == {"torch": verdict}


def test_the_way_of_attention() -> None:
    lacking = FACTS | {"varlen": {"grouped queries": False, "windows": False}}
    (found,) = gpu.attention(lacking)
    assert "flex attention for grouped queries and windows" in found.found
    assert (
        "flex" not in next(gpu.attention(FACTS)).found and "document by document" in next(gpu.attention(NO_GPU)).found
    )


def test_the_probe_tells_of_this_torch() -> None:
    facts = torch_probe.facts()
    assert (facts["torch"], facts["cuda"], len(facts["gpus"])) == (
        torch.__version__, torch.version.cuda, torch.cuda.device_count(),
    )  # fmt: skip
    assert json.loads(json.dumps(facts)) == facts and [*torch_findings(facts, [])]


def test_a_probe_that_fails_or_hangs() -> None:
    def started(code: str) -> "subprocess.Popen[str]":
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    failed = gpu.read_probe(started("import a_torch_that_is_not_there"), 60)
    assert isinstance(failed, Finding) and failed.verdict == "mend" and "No module named" in failed.found
    hanging = gpu.read_probe(started("import time; time.sleep(600)"), 0.1)
    assert isinstance(hanging, Finding) and hanging.verdict == "note" and "0.1 s" in hanging.found


def test_a_probe_that_does_not_end_when_it_is_killed(tmp_path: Path) -> None:
    """Its own child has its output open still, as a process in the driver would; doctor is through before that ends."""
    command = ["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait"]
    probe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
        time.sleep(0.01)
    found = gpu.read_probe(probe, 0.1)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # ProcessLookupError if it has ended
    assert isinstance(found, Finding) and found.verdict == "note" and "0.1 s" in found.found


def test_apex(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert verdicts(installed.apex(None)) == {"apex": "ok"}
    assert verdicts(installed.apex({"adamw": None, "rms_norm": None})) == {"apex": "ok"}
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    (tmp_path / "apex-0.9.10.dist-info").mkdir()
    (tmp_path / "apex-0.9.10.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = [*installed.apex(torch_probe.facts()["apex"])]
    assert {finding.verdict for finding in found} == {"note"}
    assert all("apex 0.9.10.dev0" in finding.found and "another project's" in finding.found for finding in found)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


def test_slurm(command: Any) -> None:
    rows = (
        "gpu*|up|1-00:00:00|4|64|gpu:8",
        "cpu|up|infinite|2|32|(null)",
        "old|down|1:00|1|8|(null)",
        "gpu*|up|1-00:00:00|1|64|gpu:4",
    )
    printed = "\n".join(f"echo '{row}'" for row in rows)
    command("sinfo", f"if [ $1 = --version ]; then echo slurm 24.11.5; else\n{printed}\nfi")
    found = {finding.name: finding for finding in slurm()}
    assert verdicts([*found.values()]) == {
        "Slurm": "ok", "partition cpu": "ok", "partition gpu": "ok", "partition old": "note",
    }  # fmt: skip
    assert found["Slurm"].found == "slurm 24.11.5"
    assert found["partition gpu"].found == (
        "1 nodes of 64 CPUs and gpu:4; 4 nodes of 64 CPUs and gpu:8; time limit 1-00:00:00, the default"
    )
    assert found["partition cpu"].found == "2 nodes of 32 CPUs; time limit infinite"


@pytest.mark.parametrize(
    ("mode", "grace", "advice"),
    [("REQUEUE", 0, "slurm-requeue: true"), ("CANCEL", 0, "nothing starts them again"), ("REQUEUE", 600, "")],
)
def test_partitions_that_preempt_without_a_grace_time(mode: str, grace: int, advice: str, command: Any) -> None:
    """As Slurm 22.05 writes it, but for what is left out; nothing has more priority than `urgent`."""
    rows = ("main*|up|infinite|4|16|gpu:h100:8", "urgent|up|infinite|4|16|gpu:h100:8")
    printed = "\n".join(f"echo '{row}'" for row in rows)
    command("sinfo", f"if [ $1 = --version ]; then echo slurm-wlm 22.05.8; else\n{printed}\nfi")
    partitions = (
        f"PartitionName=main Default=YES QoS=N/A DefaultTime=00:30:00 GraceTime={grace} Hidden=NO Nodes=node[1-4]"
        f" PriorityJobFactor=1 PriorityTier=1 RootOnly=NO PreemptMode={mode} State=UP JobDefaults=(null)",
        "PartitionName=urgent Default=NO QoS=N/A DefaultTime=00:30:00 GraceTime=0 Hidden=NO Nodes=node[1-4]"
        f" PriorityJobFactor=1 PriorityTier=2 RootOnly=NO PreemptMode={mode} State=UP JobDefaults=(null)",
    )
    said = "\n".join(f"echo '{line}'" for line in partitions)
    settings = "echo 'PreemptMode             = REQUEUE'; echo 'PreemptType             = preempt/partition_prio'"
    command("scontrol", f"if [ $2 = config ]; then {settings}; else\n{said}\nfi")
    _, main, urgent = slurm()
    assert urgent.verdict == "ok"
    assert main.verdict == ("note" if advice else "ok") and advice in main.advice
    assert main.found.endswith(
        f"; jobs of more priority may kill its own, without a grace time ({mode})" if advice else ", the default"
    )
    command("scontrol", f"if [ $2 = config ]; then echo 'PreemptType = preempt/none'; else\n{said}\nfi")
    assert verdicts(slurm()) == {"Slurm": "ok", "partition main": "ok", "partition urgent": "ok"}


def test_accounting_is_told(command: Any) -> None:
    command("sinfo", "if [ $1 = --version ]; then echo slurm 24.11.5; else echo 'main*|up|infinite|4|16|(null)'; fi")
    command("scontrol", "echo 'AccountingStorageType   = accounting_storage/slurmdbd'")
    _, accounting, _ = slurm()
    assert accounting.verdict == "ok" and "slurm-status-command: sacct" in accounting.found
    command("scontrol", "echo 'AccountingStorageType   = (null)'")
    assert "accounting" not in verdicts(slurm())


def test_slurm_that_does_not_answer(command: Any) -> None:
    command("sinfo", "[ $1 = --version ] && exit 0; echo 'slurm_load_partitions: Unable to contact' >&2; exit 1")
    (found,) = slurm()
    assert found.verdict == "note" and "Unable to contact" in found.found


def test_no_slurm_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert verdicts(slurm()) == {"Slurm": "note"}


def test_a_command_that_hangs_is_given_up(command: Any) -> None:
    command("sinfo", "exec sleep 600")
    assert told_by("sinfo", seconds=0.1) == (None, "sinfo did not answer in 0.1 s")


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(installed.packages()) == {"packages": "ok"}
    monkeypatch.setattr(
        installed, "requires", lambda _: ["numpy>=2", "torch>=99.1", "no-such-package>=1", "x; extra=='lint'"]
    )
    (found,) = installed.packages()
    assert found.verdict == "mend" and found.advice == "pip install 'torch>=99.1' 'no-such-package>=1'"
    assert f"torch is {torch.__version__}, expected >=99.1, no-such-package is missing" == found.found
    assert installed._problem(Requirement("torch>=2.0")) is None  # a local version, as 2.13.0+cpu, counts


def test_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(installed.helpers()) == {"helpers": "ok"}
    monkeypatch.setitem(sys.modules, "llmpipe.helpers", None)
    (found,) = installed.helpers()
    assert found.verdict == "mend" and "pip install -e ." in found.advice


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdicts(installed.python()) == {"Python": "ok"}
    monkeypatch.setattr(sys, "version_info", (3, 10, 1))
    assert verdicts(installed.python()) == {"Python": "mend"}


def test_disk_and_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = type("usage", (), {"total": 1000 << 30, "free": 0})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    for free, verdict in ((1, "mend"), (50, "note"), (500, "ok")):
        usage.free = free << 30
        assert verdicts(machine.disk(tmp_path)) == {"disk": verdict}
    for total, verdict in ((64 << 20, "note"), (8 << 30, "ok")):
        usage.total = total
        assert verdicts(machine.shared_memory(tmp_path)) == {str(tmp_path): verdict}
    assert verdicts(machine.shared_memory(tmp_path / "none")) == {str(tmp_path / "none"): "note"}


def test_locked_memory_counts_where_there_is_infiniband(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [*machine.locked_memory(tmp_path / "none"), *machine.locked_memory(tmp_path)] == []
    (tmp_path / "mlx5_0").touch()
    for limit, verdict in ((64 * 1024, "note"), (resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert verdicts(machine.locked_memory(tmp_path)) == {"locked memory": verdict}


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    told = subprocess.check_output(["df", "--output=fstype", str(tmp_path)], text=True).split()[-1]
    assert machine.file_system(tmp_path) == told
    assert machine.is_shared("nfs4") and machine.is_shared("fuse.sshfs") and not machine.is_shared("ext4")


def test_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (absent,) = store(None)
    assert absent.verdict == "ok" and "not there yet" in absent.found and str(tmp_path / "mlflow.db") in absent.found
    with sqlite3.connect("mlflow.db") as connection:
        connection.execute("create table runs (id)")
        connection.execute("insert into runs values (1)")
    connection.close()
    (found,) = store(None)
    assert found.verdict == "ok" and found.found.endswith("1 runs")
    Path("mlflow.db").write_text("x" * 2000)
    assert verdicts(store(None)) == {"MLflow": "note"}
    Path("config").mkdir()
    Path("config/config.yaml").write_text("runs: []\ntracking: {uri: postgresql://there/x}\n")
    (other,) = store(None)
    assert "postgresql://there/x" in other.found and other.verdict == "note"
    Path("config/config.yaml").write_text("runs: []\ntracing: {}\n")
    (wrong,) = store(None)
    assert "config/config.yaml: unknown key tracing" in wrong.found


def test_the_server() -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    uri = f"http://127.0.0.1:{server.server_port}"
    try:
        assert verdicts(store(uri)) == {"MLflow": "ok"}
        assert "status 404" in next(store(f"{uri}/elsewhere")).found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (gone,) = store(uri)
    assert gone.verdict == "note" and "does not answer" in gone.found


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmpipe.doctor.machine.FULL_DISK", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = CliRunner().invoke(group, ["doctor"])
    names = [text.split()[1] for text in done.stdout.splitlines() if text.startswith(("ok", "note", "mend"))]
    assert done.exit_code == 0, done.stdout
    assert names[:4] == ["Python", "packages", "helpers", "torch"] and names[-1] == "MLflow"
    assert done.stdout.endswith("\nnothing to mend\n")
    monkeypatch.setattr("llmpipe.doctor.machine.FULL_DISK", 1 << 80)
    done = CliRunner().invoke(group, ["doctor"])
    assert done.exit_code == 1 and "\nmend  disk " in done.stdout and done.stdout.endswith("\n1 to mend\n")


def test_a_file_system_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "SECONDS", 0.5)
    monkeypatch.setattr(machine, "disk", lambda folder: threading.Event().wait())
    (disk,) = [finding for finding in doctor.examine(tmp_path, None) if finding.name == "disk"]
    assert disk.verdict == "mend" and disk.found == "no answer within 0.5 s"


def test_a_line() -> None:
    assert line(Finding("mend", "disk", "full", "make room")).endswith(
        " disk          full\n                    → make room"
    )

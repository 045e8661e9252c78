"""A private Slurm on this machine: a controller and four nodes, which are processes, all in one folder.

    python tests/cluster/private_slurm.py up FOLDER      # starts it, or what of it does not run
    python tests/cluster/private_slurm.py down FOLDER    # kills it with all its jobs, and removes FOLDER

It takes Debian's slurm-wlm and munge and no rights, runs beside any other Slurm, and writes nothing outside FOLDER.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from tempfile import mkdtemp

NODES = [f"node{number}" for number in range(1, 5)]
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
GPUS = 8  # of each node: devices that do nothing
LONGEST_FOLDER = 85  # a socket's path has 107 bytes
SLOTS, PORTS, JOB_IDS = 250, 16, 50  # clusters on one machine, each with so many ports and job ids of its own

SLURM_CONF = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
PlugStackConfig={folder}/etc/plugstack.conf
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
Epilog={folder}/etc/epilog
AccountingStorageType=accounting_storage/none
# The nodes share one machine: nobody is pinned or caged, and what they claim to have is believed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MpiDefault=none
# A node is dead soon; a busy machine is not.
SlurmdTimeout=30
SlurmctldTimeout=60
MessageTimeout=60
TCPTimeout=20
BatchStartTimeout=120
KillWait=30
MinJobAge=7200
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# Jobs of the partition urgent take the nodes of those in main, which are told to end, and killed ten minutes later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=1000000 \
    Gres=gpu:h100:{gpus} Feature=80gb
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=30 DefMemPerCPU=2000 PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=ALL DefaultTime=30 DefMemPerCPU=2000 PriorityTier=2 PreemptMode=OFF
"""


class PrivateSlurm:
    """The cluster in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        name = str(self.folder)
        if len(name) > LONGEST_FOLDER or any(letter.isspace() for letter in name):
            raise SystemExit(f"{name}: a folder without spaces, of {LONGEST_FOLDER} letters at most, is expected")

    @property
    def environment(self) -> dict[str, str]:
        """What its daemons, and whatever is to talk to them, find in their environment."""
        places = [self.folder / "bin", Path(sys.executable).parent, os.environ["PATH"], "/usr/local/sbin:/usr/sbin"]
        own = {"SLURM_CONF": f"{self.folder}/etc/slurm.conf", "PATH": ":".join(map(str, places))}
        return {key: value for key, value in os.environ.items() if not key.startswith("SLURM")} | own

    def call(self, *command: str, **more: str) -> str:
        """What a command says; `more` is added to its environment."""
        done = subprocess.run(command, env=self.environment | more, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}; see {self.folder}/log")
        return done.stdout

    def up(self) -> None:
        """Start what does not run, and wait until all nodes can take jobs."""
        if not (self.folder / "etc/slurm.conf").exists():
            self._write_config()
        run, log = self.folder / "run", self.folder / "log"
        if not self._runs("munged"):
            self.call(
                "munged", "--force", f"--key-file={self.folder}/etc/munge.key", f"--socket={run}/munge.socket",
                f"--pid-file={run}/munged.pid", f"--seed-file={run}/munge.seed", f"--log-file={log}/munged.log",
            )  # fmt: skip
        if not self._runs("slurmctld"):
            self.call("slurmctld")
        for node in NODES:
            if not self._runs(f"slurmd-{node}"):
                self.call("slurmd", "-N", node, SLURMD_NODENAME=node)
        wait_for(self._nodes_are_ready, "all nodes being ready")

    def _runs(self, daemon: str) -> bool:
        try:
            return int((self.folder / f"run/{daemon}.pid").read_text()) in self.processes()
        except (OSError, ValueError):
            return False

    def _nodes_are_ready(self) -> bool:
        try:
            states = [line.split() for line in self.call("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()]
        except RuntimeError:  # the controller does not answer yet
            return False
        for node, state in states:
            if state.startswith(("down", "drain")):
                self.call("scontrol", "update", f"nodename={node}", "state=resume")
        return len(states) == len(NODES) and all(state in ("idle", "mixed", "allocated") for _, state in states)

    def _write_config(self) -> None:
        for name in ("bin", "etc", "run", "log", "state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        slot = _free_slot()
        port = _port(slot)
        of_nodes = [
            f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port + number}"
            for number, node in enumerate(NODES, 1)
        ]
        etc = self.folder / "etc"
        own = {"host": _host(), "port": port, "first_job": 1 + slot * JOB_IDS, "user": getuser(), "gpus": GPUS}
        (etc / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, nodes="\n".join(of_nodes), **own))
        (etc / "plugstack.conf").touch()  # else that of /etc is read
        # slurmd looks for a cgroup file system unless it is told not to.
        version = self.call("slurmd", "-V").split()[1]
        (etc / "cgroup.conf").write_text(f"CgroupPlugin={'cgroup/v1' if version < '24' else 'disabled'}\n")
        (self.folder / "dev").mkdir()
        for number in range(GPUS):
            (self.folder / f"dev/gpu{number}").symlink_to("/dev/null")
        (etc / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.folder}/dev/gpu[0-{GPUS - 1}]\n")
        (etc / "munge.key").touch(mode=0o600)
        (etc / "munge.key").write_bytes(os.urandom(1024))
        self.set_epilog("")
        # Snakemake takes SLURM_CONF out of its jobs' environment, so each command sets it for itself.
        for client in CLIENTS:
            self._write_script(f"bin/{client}", f'SLURM_CONF={etc}/slurm.conf exec {shutil.which(client)} "$@"')

    def set_epilog(self, script: str) -> None:
        """What each node does when a job has ended there, before the job counts as ended."""
        self._write_script("etc/epilog", script)

    def _write_script(self, name: str, script: str) -> None:
        new = self.folder / f"{name}.new"
        new.write_text(f"#!/bin/sh\n{script}\n")
        new.chmod(0o755)
        new.replace(self.folder / name)

    @contextmanager
    def slow(self, client: str) -> Iterator[Callable[[], bool]]:
        """Have a client's answer take three seconds; gives a function that tells whether it is being asked."""
        script, asked = self.folder / f"bin/{client}", self.folder / "run/asked"
        own = script.read_text().removeprefix("#!/bin/sh\n").rstrip()
        self._write_script(f"bin/{client}", f"touch {asked}; sleep 3; rm {asked}\n{own}")
        try:
            yield asked.exists
        finally:
            self._write_script(f"bin/{client}", own)
            asked.unlink(missing_ok=True)

    @contextmanager
    def failing(self, client: str, times: int) -> Iterator[None]:
        """Have a client say so often that it cannot reach the controller."""
        script, left = self.folder / f"bin/{client}", self.folder / "run/left"
        own = script.read_text().removeprefix("#!/bin/sh\n").rstrip()
        left.write_text("x" * times)
        fail = f"if [ -s {left} ]; then truncate -s -1 {left}; echo 'Unable to contact controller' >&2; exit 1; fi"
        self._write_script(f"bin/{client}", f"{fail}\n{own}")
        try:
            yield
        finally:
            self._write_script(f"bin/{client}", own)
            left.unlink()

    def processes(self, variable: str = "") -> list[int]:
        """Its processes, jobs' included, and whose talk to it: their environment names the folder, and the variable."""
        found = list[int]()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes()
            except OSError:
                continue
            ours = f"{self.folder}/".encode() in environment and int(path.name) != os.getpid()
            if ours and (not variable or variable.encode() in environment.split(b"\0")):
                found.append(int(path.name))
        return found

    def signal_node(self, node: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a node at once: SIGKILL is a crash, SIGSTOP a node that hangs.

        They are stopped first, so that none of them sees another one die.
        """
        stopped = set[int]()
        while new := {*self.processes(f"SLURMD_NODENAME={node}")} - stopped:
            _kill(new, signal.SIGSTOP)
            stopped |= new
        _kill(stopped, number)

    def jobs(self, *options: str) -> list[list[str]]:
        """The id, state, nodes and comment of each job; `options` of squeue, which shows those that have not ended."""
        lines = self.call("squeue", "-h", "-o", "%i|%T|%N|%k", *options).splitlines()
        return [line.split("|") for line in lines]

    def cancel_jobs(self) -> None:
        """Cancel all jobs, and wait until they are gone."""
        for job, *_ in self.jobs():
            self.call("scancel", job)
        self.wait_for_no_jobs()

    def wait_for_no_jobs(self) -> None:
        wait_for(lambda: not self.jobs(), "the end of all jobs")

    def down(self) -> None:
        """Kill all of it, and remove the folder."""
        while left := self.processes():
            _kill(left, signal.SIGKILL)
            time.sleep(0.1)
        for mount in Path("/proc/mounts").read_text().splitlines():
            if (where := mount.split()[1]).startswith(f"{self.folder}/"):
                subprocess.run(["umount", where], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def _host() -> str:
    return socket.gethostname().split(".")[0]


def _port(slot: int) -> int:
    return 10000 + slot * PORTS


def _free_slot() -> int:
    """Of the ports that clusters take here, 16 that nobody has."""
    for attempt in range(SLOTS):
        slot = (os.getpid() + attempt) % SLOTS
        if all(_is_free(_port(slot) + number) for number in range(PORTS)):
            return slot
    raise SystemExit(f"no {PORTS} free ports in a row between {_port(0)} and {_port(SLOTS)}")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        return listener.connect_ex(("127.0.0.1", port)) != 0


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """AssertionError if it does not happen in time."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.2)


@contextmanager
def private_slurm() -> Iterator[PrivateSlurm]:
    """A cluster in a folder of its own, which ends with this process, however it ends: another one waits for that."""
    slurm = PrivateSlurm(Path(mkdtemp(prefix="slurm-")))
    keeper = subprocess.Popen(
        [sys.executable, __file__, "down-at-end-of-input", slurm.folder], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        slurm.up()
        yield slurm
    finally:
        keeper.communicate()


def main() -> None:
    commands = ("up", "down", "down-at-end-of-input")
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    slurm = PrivateSlurm(Path(sys.argv[2]))
    if sys.argv[1] == "up":
        slurm.up()
        print(f"Now, in a shell that is to use it: export PATH={slurm.folder}/bin:$PATH")
        return
    if sys.argv[1] == "down-at-end-of-input":
        sys.stdin.read()
    slurm.down()


if __name__ == "__main__":
    main()

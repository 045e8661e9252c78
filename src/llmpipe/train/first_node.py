"""Nodes without a scheduler: a person starts the same command on each of them, with --node-rank R --master HOST:PORT.

Node 0 holds the run folder's lease, writes RUN/job.json and serves the port; the others wait until it does.
"""

import errno
import ipaddress
import logging
import socket
import time
from dataclasses import fields

from llmpipe.errors import UserError
from llmpipe.train import lease
from llmpipe.train.job import Job, read_job

POLL, CONNECT_SECONDS = 1.0, 5.0
log = logging.getLogger(__name__)


def check_place(nodes: int, node_rank: int, master: str) -> None:
    """UserError for a place among the nodes that cannot be."""
    if not 0 <= node_rank < nodes:
        raise UserError(f"--node-rank {node_rank}: {nodes} --nodes are counted from 0, each has a number of its own")
    host_and_port(master)


def host_and_port(master: str) -> tuple[str, int]:
    """What --master says; UserError if it says something else."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--master {master}: HOST:PORT of the node with --node-rank 0 is expected, as node0:29500")
    return host.strip("[]"), int(port)


def own_address(master: str) -> str | None:
    """This node's address on the network in which it reaches the first one; None if that has none.

    Without it torch hands out the host's full name, which other nodes may not know.
    """
    host, port = host_and_port(master)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return host if ipaddress.ip_address(own).is_loopback else own  # the first node, by the name that others have for it


def check_port(master: str) -> None:
    """UserError if something on this node, the first one, serves the port of --master already."""
    _, port = host_and_port(master)
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise UserError(f"--master {master}: something on this node serves port {port}: name another") from error


def wait_for_first(job: Job, node_rank: int, master: str, wait_seconds: float) -> str | None:
    """Until node 0 trains this job: its lease's token; None if the job is finished.

    UserError if node 0 does not come in time, has another run folder there, or was given another command.
    """
    told, deadline = False, time.monotonic() + wait_seconds
    while not job.is_finished():
        answers = _answers(*host_and_port(master))
        holder, _ = lease.read(job.run)
        if answers and holder and job.path.is_file():
            _check_same(job)
            return holder.token
        if time.monotonic() > deadline:
            if answers:
                check_shared(job)
            raise UserError(
                f"node 0 does not answer at {master} within {wait_seconds:.0f} s: does this command run there with"
                " --node-rank 0, and does a firewall let this node through?"
            )
        if not told:
            log.info("node %s: waiting up to %.0f s for node 0 at %s", node_rank, wait_seconds, master)
        told = True
        time.sleep(POLL)
    log.info("%s: this training is finished", job.run)
    return None


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def check_shared(job: Job) -> None:
    """UserError on a node that does not see what the first one has written."""
    if not job.path.is_file():
        raise UserError(
            f"{job.path}, which the first node has written, is not on {socket.gethostname()}: --output has to be the"
            " same folder on all nodes, on a file system that they share"
        )


def _check_same(job: Job) -> None:
    """UserError if node 0 was given another command than this node, or sees another model or other data."""
    theirs = read_job(job.path)
    names = [field.name for field in fields(Job) if field.name != "origin"]
    differing = [name for name in names if getattr(theirs, name) != getattr(job, name)]
    if differing:
        raise UserError(
            f"node 0 has another command, or by their hashes other inputs, see {', '.join(differing)} in {job.path}:"
            " give the same command on all nodes, but for --node-rank, and the same files"
        )

"""`mlflow server` as a process of its own, that can be killed and started again, and whose answers can be held back."""

import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from followers import until

KEEPER = """
import os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
sys.stdin.read()
os.killpg(server.pid, signal.SIGKILL)
"""
"""Starts a server and kills it with its workers when its own input ends, as it does when the tests are killed."""


class Server:
    """MLflow's server on a port of this machine; its database outlives it."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", KEEPER, *command],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        until(self.answers, (self.folder / "server.log").read_text())

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """With its workers, in the middle of whatever they do."""
        if self.process:
            self.process.communicate()
            self.process = None


class Late:
    """An address of its own for a server, which takes requests at once; answers come only when they are let through."""

    def __init__(self, server: Server, listener: socket.socket):
        self._port, self._listener = server.port, listener
        self.uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.asked, self.let_through, self.answered = threading.Event(), threading.Event(), threading.Event()

    def take(self) -> None:
        while True:
            try:
                client, upstream = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            for pump in (self._ask, self._answer):
                threading.Thread(target=pump, args=(client, upstream), daemon=True).start()

    def _ask(self, client: socket.socket, upstream: socket.socket) -> None:
        while part := received(client):
            self.asked.set()
            upstream.sendall(part)
        upstream.close()

    def _answer(self, client: socket.socket, upstream: socket.socket) -> None:
        while part := received(upstream):
            self.let_through.wait()
            self.answered.set()
            try:
                client.sendall(part)
            except OSError:  # it has not waited
                break
        client.close()


def received(connection: socket.socket) -> bytes:
    """The next bytes; none at the end."""
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


@contextmanager
def late(server: Server) -> Iterator[Late]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Late(server, listener)
        threading.Thread(target=made.take, daemon=True).start()
        try:
            yield made
        finally:
            made.let_through.set()

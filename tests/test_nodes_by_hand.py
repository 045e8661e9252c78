"""Several nodes without a scheduler: the same command on each, here two launchers on the loopback."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_command import (
    LLMPIPE,
    assert_trained_alike,
    finetune_arguments,
    num_steps,
    train_undisturbed,
    wait_for_step,
    wait_for_torchrun,
    wait_until_no_rank_lives,
)
from llmpipe.train import first_node

Launcher = subprocess.Popen[str]


class Nodes:
    """Two nodes of one process each, TP 2 over both, into folder/run."""

    def __init__(self, arguments: list[str], run: Path):
        self.arguments, self.run = arguments, run
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.master = f"127.0.0.1:{free.getsockname()[1]}"
        self.started: list[Launcher] = []

    def start(self, node: int, *more: str) -> Launcher:
        place = ["--nodes", "2", "--gpus-per-node", "1", "--node-rank", str(node), "--master", self.master]
        command = [*LLMPIPE, *self.arguments, *place, *more]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return self.started[-1]


def test_a_node_is_told_to_the_others_by_what_they_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address, not its host's name; the first node, where its own name is a loopback address, by the name given."""
    assert first_node.own_address("127.0.0.1:29500") == "127.0.0.1"
    assert first_node.own_address("localhost:29500") == "localhost"
    assert first_node.own_address("no-such-host.invalid:29500") is None
    first = socket.getaddrinfo("127.0.0.1", 29500, type=socket.SOCK_DGRAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: first if host == "node0" else [])
    monkeypatch.setattr(socket.socket, "getsockname", lambda _: ("10.1.2.3", 4711))  # as on another machine
    assert first_node.own_address("node0:29500") == "10.1.2.3"


@pytest.fixture(scope="module")
def arguments(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return finetune_arguments(checkpoint, dataset, tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(arguments: list[str]) -> Path:
    """The run of one node with two processes."""
    return train_undisturbed(arguments, Path(arguments[arguments.index("--output") + 1]))


@pytest.fixture
def nodes(arguments: list[str], tmp_path: Path) -> Iterator[Nodes]:
    run = tmp_path / "run"
    output = arguments.index("--output") + 1
    both = Nodes([*arguments[:output], str(run), *arguments[output + 1 :]], run)
    yield both
    for launcher in both.started:
        launcher.kill()
        launcher.communicate()
    wait_until_no_rank_lives(run)


def ended(launcher: Launcher) -> tuple[int, str]:
    """Its exit status, within three minutes, and what the person on its node saw."""
    said, _ = launcher.communicate(timeout=180)
    return launcher.returncode, said


def assert_trained(*launchers: Launcher) -> None:
    for launcher in launchers:
        status, said = ended(launcher)
        assert status == 0, said


def assert_resumed_after_step_10(nodes: Nodes, undisturbed: Path) -> None:
    assert "resumed after step 10" in (nodes.run / "log.txt").read_text()
    assert_trained_alike(nodes.run, undisturbed)


def test_two_nodes_train_as_one_does_whichever_is_started_first(nodes: Nodes, undisturbed: Path) -> None:
    second = nodes.start(1)
    time.sleep(3)
    first = nodes.start(0)
    assert_trained(first, second)
    assert_trained_alike(nodes.run, undisturbed)
    # Again, both find it finished.
    for node in (1, 0):
        status, said = ended(nodes.start(node))
        assert status == 0 and "this training is finished" in said, said


@pytest.mark.slow
def test_when_the_second_node_is_killed_the_first_one_waits_for_it(nodes: Nodes, undisturbed: Path) -> None:
    first, second = nodes.start(0), nodes.start(1)
    wait_for_step(nodes.run, 12)
    second.kill()
    assert '"pid": ' + str(first.pid) in (nodes.run / "lease").read_text()
    assert_trained(first, nodes.start(1))
    assert_resumed_after_step_10(nodes, undisturbed)


@pytest.mark.slow
def test_when_the_first_node_is_killed_the_second_one_ends_and_both_go_on(nodes: Nodes, undisturbed: Path) -> None:
    first, second = nodes.start(0), nodes.start(1)
    wait_for_step(nodes.run, 12)
    first.kill()
    status, said = ended(second)
    assert status == 1 and "Traceback" not in said.splitlines()[-1], said
    assert re.search(r"training failed after step \d+: .*goes on from .*step-00000010", said), said
    assert_trained(nodes.start(1), nodes.start(0))
    assert_resumed_after_step_10(nodes, undisturbed)


def test_either_can_be_asked_to_stop(nodes: Nodes, undisturbed: Path) -> None:
    first, second = nodes.start(0), nodes.start(1)
    wait_for_step(nodes.run, 3)
    second.send_signal(signal.SIGINT)
    assert ended(first)[0] == ended(second)[0] == 75
    assert_trained(nodes.start(0), nodes.start(1))
    assert_trained_alike(nodes.run, undisturbed)


@pytest.mark.slow
def test_the_first_can_be_stopped_while_it_waits_for_the_second(nodes: Nodes) -> None:
    first = nodes.start(0)
    wait_for_torchrun(nodes.run)
    first.send_signal(signal.SIGINT)
    assert ended(first)[0] == 75
    assert num_steps(nodes.run) == 0


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--wait", "1"], r"node 0 does not answer at 127.0.0.1:\d+ within 1 s: .* --node-rank 0"),
        (["--node-rank", "0"], r"something on this node serves port \d+: name another"),
    ],
)
def test_what_cannot_work_is_said(more: list[str], text: str, nodes: Nodes) -> None:
    host, port = nodes.master.split(":")
    with socket.create_server((host, int(port))) if "--node-rank" in more else open(os.devnull):  # noqa: PTH123
        status, said = ended(nodes.start(1, *more))
    assert status == 1 and re.search(text, said), said


def test_another_command_than_the_first_nodes_is_refused(nodes: Nodes) -> None:
    nodes.start(0)
    status, said = ended(nodes.start(1, "--exit-at-step", "7"))
    assert status == 1 and "see exit_at_step in " in said, said


def test_a_run_folder_that_is_not_shared_is_said(nodes: Nodes, tmp_path: Path) -> None:
    nodes.start(0)
    status, said = ended(nodes.start(1, "--output", str(tmp_path / "local"), "--wait", "20"))
    assert status == 1 and "has to be the same folder on all nodes" in said, said

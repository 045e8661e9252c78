"""The two-node run on a real Slurm, undisturbed and disturbed: all of `make test-cluster SHORT=1`."""

import json
import signal
import sys
from pathlib import Path

from browser import Browser
from drill_project import RUN, STEPS, DrillProject, assert_same
from mlflow import MlflowClient
from test_browser_mlflow import shown, text

sys.path.append(str(Path(__file__).parents[1] / "track"))
from tracking_server import Server

METRICS = (
    "cpu_utilization_percentage", "disk_available_megabytes", "network_receive_megabytes", "network_transmit_megabytes",
    "system_memory_usage_megabytes", "system_memory_usage_percentage",
)  # fmt: skip
"""What a node without GPUs tells of itself."""


def test_each_stage_is_a_job_and_the_training_takes_two_nodes(undisturbed: DrillProject) -> None:
    jobs = undisturbed.slurm.jobs("-t", "all")
    by_rule = {comment.split("_wildcards")[0]: (state, nodes) for _, state, nodes, comment in jobs}
    rules = ("convert", "verify", "tokenize", "shard", "verify_shards", "finetune")
    assert by_rule.keys() == {f"rule_{rule}" for rule in rules}
    assert {state for state, _ in by_rule.values()} == {"COMPLETED"}
    assert by_rule["rule_finetune"][1] == "node[1-2]"
    assert (undisturbed.run / "tracked/finetune.json").exists()
    losses = [line["loss"] for line in undisturbed.metrics()]
    assert len(losses) == STEPS and losses[-1] < losses[0] / 1.2
    assert_same(undisturbed, undisturbed)


def test_what_each_node_was_busy_with_is_in_the_store(undisturbed: DrillProject, browser: Browser) -> None:
    """The numbers and times of its own launcher, in a section of its own on the run's page."""
    server = Server(undisturbed.folder)  # of the store that the workflow has written
    server.start()
    try:
        client = MlflowClient(server.uri)
        (run,) = client.search_runs(["1"], f"tags.`llmpipe.kind` = 'run' and attributes.run_name = '{RUN}'")
        for node in ("node1", "node2"):
            lines = [json.loads(line) for line in (undisturbed.run / f"system/{node}.jsonl").read_text().splitlines()]
            assert len(lines) > 0
            for name in METRICS:
                points = client.get_metric_history(run.info.run_id, f"system/{node}/{name}")
                assert [(one.timestamp, one.value) for one in points] == [
                    (int(1000 * line["time"]), line[name]) for line in lines
                ]
        address = f"{server.uri}/#/experiments/1/runs/{run.info.run_id}/system-metrics"
        with shown(browser, address, ("system/node1", "system/node2"), "two-nodes-system", (1500, 1700), 12) as page:
            assert all(f"system/{node} ({len(METRICS)})" in text(page) for node in ("node1", "node2"))
    finally:
        server.kill()


def test_term_and_then_a_node_that_crashes(project: DrillProject, undisturbed: DrillProject) -> None:
    """TERM as ahead of a time limit; then the node without the batch script dies in mid-step."""
    project.start()
    project.until_saved()
    first, _ = project.training()
    with project.paused():  # so that it is not done before the signal comes
        before = project.steps
        project.slurm.call("scancel", "--signal=TERM", first)
        project.until_asked_to_stop()
    stopped_at = project.until_resumed()
    assert stopped_at >= before  # it was saved at once

    project.until_saved(after=stopped_at)
    second, nodes = project.training()
    assert second != first
    project.slurm.signal_node(nodes[1], signal.SIGKILL)
    project.until_resumed(times=2)
    third, others = project.training()
    assert third != second and nodes[1] not in others

    project.finish()
    assert_same(project, undisturbed)

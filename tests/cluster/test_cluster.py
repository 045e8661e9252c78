"""The two-node run on a real Slurm, undisturbed and disturbed: all of `make test-cluster SHORT=1`."""

import signal

from drill_project import STEPS, DrillProject, assert_same


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

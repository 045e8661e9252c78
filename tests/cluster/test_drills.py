"""What clusters do to a training, each on a real Slurm, each ending with the weights of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browser import LAPTOP, SCREENS, Browser
from drill_project import RECORD, RUN, STEPS, TARGET, DrillProject, assert_same
from mlflow import MlflowClient

URGENT = ("--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")


def test_time_limit(project: DrillProject, undisturbed: DrillProject) -> None:
    """Slurm sends TERM two minutes ahead of the limit; the training saves, and another job goes on."""
    project.start(RECORD, "--set-resources", "finetune:runtime=4")
    saved = project.until_saved()
    first, _ = project.training()
    with project.paused():
        project.until_asked_to_stop()
    assert project.until_resumed() > saved
    assert project.training()[0] != first
    project.finish()
    assert_same(project, undisturbed)


def test_preemption(project: DrillProject, undisturbed: DrillProject) -> None:
    """Urgent jobs take all nodes. With a grace time the training saves, and comes back in a new job; without one it is
    killed, nobody starts it again and Snakemake waits: Ctrl-C, and the same command."""
    project.slurm.call("scontrol", "update", "partitionname=main", "preemptmode=cancel")
    try:
        project.start()
        saved = project.until_saved()
        first, _ = project.training()
        project.slurm.call("sbatch", *URGENT)
        stopped_at = project.until_resumed()
        assert stopped_at > saved
        saved = project.until_saved(after=stopped_at)
        second, _ = project.training()
        assert second != first
        project.slurm.call("scontrol", "update", "partitionname=main", "gracetime=0")
        project.slurm.call("sbatch", *URGENT)
        project.until(lambda: [second, "PREEMPTED"] in [job[:2] for job in project.slurm.jobs("-t", "all")], "its end")
        project.until(lambda: "A Job preemption" in project.story(), "a word on it")
    finally:
        project.slurm.call("scontrol", "update", "partitionname=main", "preemptmode=requeue", "gracetime=600")
    assert project.process
    os.killpg(project.process.pid, signal.SIGINT)
    project.finish(expected=1)
    project.start()
    assert project.until_resumed(times=2) >= saved
    project.finish()
    assert_same(project, undisturbed)


def test_preemption_that_requeues(project: DrillProject, undisturbed: DrillProject) -> None:
    """The job is killed: no grace time. In a profile for such clusters Slurm starts it again, two minutes later."""
    shipped = (project.folder / "slurm/config.yaml").read_text()
    assert "slurm-no-requeue: true" in shipped
    (project.folder / "slurm").unlink()  # a link
    (project.folder / "slurm").mkdir()
    (project.folder / "slurm/config.yaml").write_text(shipped.replace("slurm-no-requeue", "slurm-requeue"))
    project.start()
    saved = project.until_saved()
    first, _ = project.training()
    project.slurm.call("scontrol", "update", "partitionname=main", "gracetime=0")
    project.slurm.call("sbatch", *URGENT)
    try:
        assert project.until_resumed() >= saved
    finally:
        project.slurm.call("scontrol", "update", "partitionname=main", "gracetime=600")
    assert project.training()[0] == first
    project.finish()
    assert_same(project, undisturbed)


def test_node_with_the_batch_script_dies(project: DrillProject, undisturbed: DrillProject) -> None:
    """In mid-step, and with it the launcher that holds the lease."""
    project.start()
    saved = project.until_saved()
    first, nodes = project.training()
    project.slurm.signal_node(nodes[0], signal.SIGKILL)
    assert project.until_resumed() >= saved
    second, others = project.training()
    assert second != first and nodes[0] not in others
    project.finish()
    assert_same(project, undisturbed)


def test_node_that_hangs(project: DrillProject, undisturbed: DrillProject) -> None:
    """All on it stands still; it comes back when another job has finished the training, and spoils nothing."""
    project.start()
    project.until_saved()
    first, nodes = project.training()
    project.slurm.signal_node(nodes[0], signal.SIGSTOP)
    project.until_resumed()
    second, others = project.training()
    assert second != first and nodes[0] not in others
    project.finish()
    project.slurm.signal_node(nodes[0], signal.SIGCONT)
    project.slurm.up()
    assert_same(project, undisturbed)


def test_snakemake_killed_and_started_again(project: DrillProject, undisturbed: DrillProject) -> None:
    """Its job trains on; that of the second Snakemake, which says so, waits for it in the queue, and publishes what it
    has trained."""
    project.start()
    project.until_saved()
    first, _ = project.training()
    with project.paused():
        project.kill_snakemake()
        assert project.snakemake("--unlock").wait() == 0
        project.start()
        project.until(lambda: len(project.trainings) == 2, "a second job")
        assert [(state, nodes) for _, state, nodes in project.trainings][1] == ("PENDING", [])
        assert project.training()[0] == first
    project.finish()
    assert f"in Slurm job {first} since" in project.story()
    assert project.resumed == [STEPS], project.story()  # the first job did all of them
    assert_same(project, undisturbed)


def test_ctrl_c(project: DrillProject, undisturbed: DrillProject) -> None:
    """While Snakemake asks for the job's state, when it forgets it: the job is cancelled all the same; the same command
    goes on, and what two jobs have trained is one MLflow run."""
    project.start()
    saved = project.until_saved()
    assert project.process
    with project.slurm.slow("squeue") as is_asked:
        with project.paused():  # so that it is not done before
            project.until(is_asked, "a look at the queue")
            os.killpg(project.process.pid, signal.SIGINT)
        project.finish(expected=1)
    project.slurm.wait_for_no_jobs()
    assert not (project.run / "run.json").exists(), project.story()
    project.start(TARGET)
    assert project.until_resumed() >= saved
    project.finish()
    assert_same(project, undisturbed)
    identity = json.loads((project.run / "run.json").read_text())["origin"]["training"]
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    (mirrored,) = client.search_runs(["1"], f"tags.`llmpipe.identity` = '{identity}'")
    losses = client.get_metric_history(mirrored.info.run_id, "loss/train")
    assert mirrored.info.status == "FINISHED"
    told = [(line["step"], line["loss"]) for line in project.metrics()]
    assert [(point.step, point.value) for point in losses] == told


def test_full_disk(project: DrillProject, undisturbed: DrillProject) -> None:
    """Nothing more can be written: a warning; training goes on, and its metrics wait in memory until there is room."""
    if os.geteuid():
        pytest.skip("a small file system is mounted for this one, which takes root")
    project.run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", project.run], check=True)
    project.start()
    project.until_saved()
    fill(project.run / "filler")
    project.until(lambda: "No space left on device" in project.story(), "a word on the full disk")
    (project.run / "filler").unlink()
    project.finish()
    assert project.resumed == [], project.story()
    assert_same(project, undisturbed)


def fill(path: Path) -> None:
    """Take all room that is left."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def test_outputs_that_appear_late(project: DrillProject, undisturbed: DrillProject) -> None:
    """A shared file system that lags: the outputs of a job that has ended are seen 15 seconds later."""
    outputs = "weights metrics.jsonl run.json"
    hide = f"cd {project.run} && test -e run.json && mkdir .late && mv {outputs} .late"
    show = f"sleep 15; cd {project.run}/.late && mv {outputs} .. && rmdir ../.late"
    project.slurm.set_epilog(f'if {hide}; then setsid sh -c "{show}" < /dev/null > /dev/null 2>&1 & fi; exit 0')
    try:
        project.start()
        project.until((project.run / ".late").exists, "outputs that are not to be seen")
        project.finish()
    finally:
        project.slurm.set_epilog("")
    assert_same(project, undisturbed)


def test_a_corpus_in_parts_over_nodes(project: DrillProject, undisturbed: DrillProject) -> None:
    """Three jobs share the corpus, two fit on a node; joined it has the bytes that one job makes."""
    corpus = project.folder / "config/corpora/tiny_llama.yaml"
    corpus.write_text(f"{corpus.read_text()}\nparts: 3\n")
    files = [f"results/models/tiny_llama/corpora/tiny_llama{suffix}" for suffix in (".bin", ".idx")]
    known = {job for job, *_ in project.slurm.jobs("-t", "all")}
    project.start(*files)
    project.finish()
    new = [each for each in project.slurm.jobs("-t", "all") if each[0] not in known]
    nodes = [nodes for _, _, nodes, comment in new if comment.startswith("rule_tokenize_part")]
    assert len(nodes) == 3 and len(set(nodes)) == 2
    for name in files:
        assert (project.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()


def test_what_follows_a_training_are_jobs_too(undisturbed: DrillProject) -> None:
    """Evaluation, export and report, each checked and on a node."""
    undisturbed.slurm.up()
    known = {job for job, *_ in undisturbed.slurm.jobs("-t", "all")}
    undisturbed.start(f"report_{RUN}")
    undisturbed.finish()
    new = [each for each in undisturbed.slurm.jobs("-t", "all") if each[0] not in known]
    rules = sorted((comment.split("_wildcards")[0], state) for _, state, _, comment in new)
    assert rules == [(f"rule_{rule}", "COMPLETED") for rule in ("evaluate", "export", "report")], undisturbed.story()
    assert RUN in (undisturbed.run / "report.html").read_text()


def test_snakemakes_report_in_a_browser(undisturbed: DrillProject, browser: Browser) -> None:
    """Its categories and what is in one; it asks nobody for anything, and nothing fails in it."""
    command = [sys.executable, "-m", "snakemake", "-c", "1", "--report", "report.html", f"report_{RUN}"]
    subprocess.run(command, cwd=undisturbed.folder, env=undisturbed.slurm.environment, check=True)
    with browser.page(LAPTOP, False) as page:
        page.go((undisturbed.folder / "report.html").as_uri())
        for category in ("Evaluation", "Runs", "Verification"):
            page.wait_for(f"!!({link(category)})")
        page.value(f"{link('Runs')}.click()")
        page.wait_for(f"document.body.innerText.includes({RUN!r})")
        assert page.problems == []
        assert all(request.startswith(("file:", "data:", "blob:")) for request in page.requests)
        if SCREENS:
            page.screenshot(SCREENS / "snakemake-report.png", whole=False)


def link(text: str) -> str:
    """The link of that text, in JavaScript."""
    return f"[...document.querySelectorAll('a')].find(one => one.innerText.trim() == {text!r})"

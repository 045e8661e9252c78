"""One process's view of an MLflow store: brings runs up to date, writing only what is not there yet.

A run is found again by the tag `llmpipe.identity`. Its other `llmpipe.` tags say what is there: `stamp` of the files
as they were, `steps` and `samples.HOST` of the lines of metrics, `artifacts` with the start of each file's SHA-256. A
request that was cut off is sent again with the same times, and the store keeps equal points once.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe.files import sha256
from llmpipe.track.colors import COLOR, color_after, free_color
from llmpipe.track.curves import Curves, Lines, Point
from llmpipe.track.reading import reading
from llmpipe.track.store import locked, open_experiment
from llmpipe.track.subject import Subject, mtime_ms

if TYPE_CHECKING:
    from mlflow.entities import Run

METRICS_A_REQUEST = 900  # MLflow's limit is 1000 of all, with the tags
PARAMS_A_REQUEST = 100
PAGE = 1000  # runs of one answer
IDENTITY, KIND, STAMP, ARTIFACTS = "llmpipe.identity", "llmpipe.kind", "llmpipe.stamp", "llmpipe.artifacts"
NOTE = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
DIGEST = 8
"""Characters of a dataset's hash in the list of runs, as many as MLflow's own have: more hide what it is for."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Known:
    """What the store has of a run."""

    run_id: str
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Writer:
    """Writes subjects into an experiment of a store."""

    def __init__(self, uri: str, experiment: str):
        from mlflow import MlflowClient

        self.uri, self.client = uri, MlflowClient(uri)
        self.experiment_id = open_experiment(self.client, uri, experiment)
        self.color = ""
        """Of the training that was made last."""
        self.known: dict[str, Known] = {}
        """By identity."""
        self.lines: dict[Path, Lines] = {}

    def learn_all(self) -> None:
        """Ask once for all trainings and models: what has not changed since is not asked for one by one."""
        for run in self._search(f"tags.`{KIND}` != 'stage'"):
            self._learn(run)

    def bring(self, subject: Subject, parent: str | None = None) -> str:
        """Bring a subject's MLflow run, and those of its stages, up to date; returns its id."""
        stamp, known = subject.stamp(), self._find(subject, parent)
        if known.tags.get(STAMP) == stamp:
            return known.run_id
        if any(stage.identity not in self.known for stage in subject.stages):
            for run in self._search(f"tags.`{PARENT}` = '{known.run_id}'"):
                self._learn(run)
        self._log_params(known, subject.params)
        for curves in subject.curves:
            self._log_curves(known, curves, subject.start_ms)
        self._log_metrics(known, subject)
        for name, path in subject.artifacts.items():
            self.log_artifact(known.run_id, name, path)
        self._log_datasets(known, subject)
        self._set_tags(known, subject.tags | ({NOTE: subject.description} if subject.description else {}))
        for stage in subject.stages:
            self.bring(stage, known.run_id)
        if subject.export:
            self._log_model(known, subject)
        self._set_status(known, subject)
        self._set_tags(known, {STAMP: stamp})
        return known.run_id

    def log_artifact(self, run_id: str, name: str, path: Path) -> None:
        """Copy a small file, unless its bytes are there."""
        known = next(known for known in self.known.values() if known.run_id == run_id)
        there = json.loads(known.tags.get(ARTIFACTS, "{}"))
        with reading(path):
            digest = sha256(path)[:16]
        if there.get(name) != digest:
            parent = str(Path(name).parent)
            self.client.log_artifact(run_id, str(path), None if parent == "." else parent)
            self._set_tags(known, {ARTIFACTS: json.dumps(there | {name: digest})})

    def _search(self, condition: str) -> Iterator["Run"]:
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, max_results=PAGE, page_token=token)
            yield from page
            if not (token := page.token):
                return

    def _learn(self, run: "Run") -> Known:
        data = run.data
        known = Known(run.info.run_id, run.info.status, dict(data.tags), dict(data.params), dict(data.metrics))
        return self.known.setdefault(data.tags[IDENTITY], known)

    def _find(self, subject: Subject, parent: str | None) -> Known:
        """The run of a subject, made if there is none; a parent's stages have been learnt before."""
        if found := self.known.get(subject.identity):
            return found
        if not parent and (run := next(self._search(f"tags.`{IDENTITY}` = '{subject.identity}'"), None)):
            return self._learn(run)
        tags = {IDENTITY: subject.identity, KIND: subject.kind}
        if parent:
            tags[PARENT] = parent
        else:
            tags[COLOR] = self.color = self._next_color()
        made = self.client.create_run(self.experiment_id, subject.start_ms, tags, subject.name)
        if not parent:
            log.info("%s %s is the new MLflow run %s", subject.kind, subject.name, made.info.run_id)
        return self._learn(made)

    def _next_color(self) -> str:
        return color_after(self.color) if self.color else free_color(self.client, self.experiment_id)

    def _log_params(self, known: Known, params: dict[str, str]) -> None:
        """A parameter of MLflow's stays what it was at first: what a resumed run has otherwise is a tag `now.NAME`."""
        from mlflow.entities import Param

        missing = [Param(key, value) for key, value in params.items() if key not in known.params]
        for start in range(0, len(missing), PARAMS_A_REQUEST):
            self.client.log_batch(known.run_id, params=missing[start : start + PARAMS_A_REQUEST])
        changed = {f"now.{key}": value for key, value in params.items() if known.params.get(key, value) != value}
        known.params = params | known.params
        self._set_tags(known, changed)

    def _log_curves(self, known: Known, curves: Curves, start_ms: int) -> None:
        """The lines that the run lacks. Those that it has stay, though a resumed training may take a step again."""
        lines = self.lines.setdefault(curves.path, Lines(curves))
        done, batch = int(known.tags.get(curves.done_tag, 0)), []
        for number, line in lines.new():
            if number <= done:
                continue
            points = curves.points(number, line, start_ms)
            if len(batch) + len(points) > METRICS_A_REQUEST:
                self._send(known, batch, curves.done_tag, number - 1)
                batch = []
            batch += points
            done = number
        self._send(known, batch, curves.done_tag, done)

    def _send(self, known: Known, points: list[Point], tag: str, done: int) -> None:
        """Points, and in the same request the tag that says that they are there."""
        from mlflow.entities import Metric, RunTag

        if points:
            metrics = [Metric(point.chart, point.value, point.time_ms, point.step) for point in points]
            self.client.log_batch(known.run_id, metrics=metrics, tags=[RunTag(tag, str(done))])
            known.tags[tag] = str(done)

    def _log_metrics(self, known: Known, subject: Subject) -> None:
        """Numbers of the whole: of two points of a step MLflow shows the one with the later time."""
        from mlflow.entities import Metric

        changed = {key: value for key, value in subject.metrics.items() if known.metrics.get(key) != value}
        newest_ms = max([subject.end_ms, *map(mtime_ms, subject.artifacts.values())])
        metrics = [Metric(key, value, newest_ms, 0) for key, value in changed.items()]
        for start in range(0, len(metrics), METRICS_A_REQUEST):
            self.client.log_batch(known.run_id, metrics=metrics[start : start + METRICS_A_REQUEST])
        known.metrics |= changed

    def _log_datasets(self, known: Known, subject: Subject) -> None:
        """The datasets that it read, for the page's column of that name; the store takes each once."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tag, told = "llmpipe.datasets", ",".join(sorted(f"{item.part}:{item.digest}" for item in subject.datasets))
        if told and known.tags.get(tag) != told:
            inputs = [
                DatasetInput(
                    Dataset(item.name, item.digest[:DIGEST], "local", json.dumps({"uri": item.prefix})),
                    [InputTag("mlflow.data.context", item.part)],
                )
                for item in subject.datasets
            ]
            self.client.log_inputs(known.run_id, inputs)
            self._set_tags(known, {tag: told})

    def _log_model(self, known: Known, subject: Subject) -> None:
        from llmpipe.track.logged_model import log_model

        export = next(stage for stage in subject.stages if stage.name == "export")
        if known.tags.get("llmpipe.export") != export.digest:
            log_model(self.client, self.experiment_id, known.run_id, subject, export)
            self._set_tags(known, {"llmpipe.export": export.digest})

    def _set_tags(self, known: Known, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        changed = {key: value for key, value in tags.items() if known.tags.get(key) != value}
        if changed:
            self.client.log_batch(known.run_id, tags=[RunTag(key, value) for key, value in changed.items()])
            known.tags |= changed

    def _set_status(self, known: Known, subject: Subject) -> None:
        """A run whose training goes on after a failure is running again."""
        if known.status == subject.status:
            return
        if subject.status == "RUNNING":
            self.client.update_run(known.run_id, status="RUNNING")
        else:
            self.client.set_terminated(known.run_id, subject.status, subject.end_ms)
        known.status = subject.status


def bring_locked(writer: Writer, subject: Subject) -> str:
    """`bring`, while no other process of llmpipe writes of the same folder, or to the same sqlite file."""
    with locked(writer.uri, subject.folder):
        return writer.bring(subject)

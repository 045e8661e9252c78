"""MLflow's own pages in a real Chromium: what two tracked trainings show on each, in which order, and nothing empty."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from browser import SCREENS, Browser, Page
from mlflow import MlflowClient

from finetune_command import LLMPIPE, finetune_arguments
from llmpipe.track.mirror import track

sys.path.append(str(Path(__file__).parents[1] / "track"))
from run_folders import make_export, make_table
from tracking_server import Server

pytestmark = pytest.mark.skipif("LLMPIPE_CLUSTER" not in os.environ, reason="a browser's pages: make test-cluster")
SCREEN, TALL = (1500, 1000), (1500, 3200)  # charts are drawn when they come into view
NAMES = ("high_rate", "low_rate")
CHARTS = {
    "loss": ["train"],
    "optimizer": ["gradient_norm", "learning_rate"],
    "progress": ["epochs", "tokens"],
    "quality": ["accuracy", "perplexity"],
    "speed": [
        "gpu_tokens_per_second", "mfu_causal", "mfu_full", "peak_memory_gigabytes", "seconds_per_step",
        "tokens_per_second",
    ],
    "tasks/perplexity": ["perplexity_after", "perplexity_before"],
}  # fmt: skip
"""Sections and their charts from the top to the bottom."""
HAS_BEEN_HERE = """
    localStorage.setItem('mlflow.workflowType_v1', '"machine_learning"');
    localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
"""
"""What the browser of somebody remembers who has chosen "Model training" and closed the assistant."""
DRAWN = ".js-plotly-plot :is(.scatterlayer .js-line, .barlayer .point path, .scatterlayer .point)"


@pytest.fixture(scope="module")
def server(checkpoint: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MLflow's server with two trainings of 60 steps, which differ in their learning rate, evaluated and exported."""
    folder = tmp_path_factory.mktemp("server")
    results = tmp_path_factory.mktemp("project")
    for name, lr in zip(NAMES, ("1e-2", "1e-3"), strict=True):
        arguments = finetune_arguments(checkpoint, dataset, tmp_path_factory.mktemp(name))
        recipe = Path(arguments[1])
        recipe.write_text(recipe.read_text().replace("lr: 1e-3", f"lr: {lr}"))
        run = results / "runs" / name
        arguments[arguments.index("--output") + 1] = str(run)
        subprocess.run([*LLMPIPE, *arguments], check=True)
        make_table(run)
        make_export(run)
    track(results, f"sqlite:///{folder}/mlflow.db", "llmpipe")
    made = Server(folder)
    made.start()
    yield made
    made.kill()


@pytest.fixture(scope="module")
def ids(server: Server) -> dict[str, str]:
    """The trainings' MLflow runs, by name."""
    found = MlflowClient(server.uri).search_runs(["1"], "tags.`llmpipe.kind` = 'run'")
    return {str(run.info.run_name): run.info.run_id for run in found}


@contextmanager
def shown(
    browser: Browser,
    address: str,
    texts: tuple[str, ...],
    picture: str,
    size: tuple[int, int] = SCREEN,
    charts: int = 0,
) -> Iterator[Page]:
    """A page, once it has these texts, and so many charts with a line, points or bars in them."""
    with browser.page(size) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=HAS_BEEN_HERE)
        page.go(address)
        page.wait_for(f"{json.dumps(texts)}.every(text => document.body.innerText.includes(text))")
        page.wait_for(f"new Set({found(DRAWN)}.map(mark => mark.closest('.js-plotly-plot'))).size >= {charts}")
        if SCREENS:
            page.screenshot(SCREENS / f"mlflow-{picture}.png", whole=False)
        yield page


def found(selector: str) -> str:
    """JavaScript's array of the elements."""
    return f"[...document.querySelectorAll({json.dumps(selector)})]"


def text(page: Page) -> str:
    """What is on it, headings as `speed (6)`."""
    return page.value("document.body.innerText").replace("\n(", " (")


def charts_by_section(words: list[str]) -> dict[str, list[str]]:
    """Of a page's lines: a heading, followed by the names of its charts."""
    wanted = {name for names in CHARTS.values() for name in names}
    seen: dict[str, list[str]] = {}
    for word in words:
        section = word.rpartition(" (")[0]
        if section in CHARTS and word == f"{section} ({len(CHARTS[section])})":
            seen[section] = []
        elif word in wanted:
            seen[next(reversed(seen))].append(word)
    return seen


def test_the_page_of_runs(server: Server, browser: Browser) -> None:
    """Trainings with dataset, what it was for, and model; their stages are folded away under them."""
    with shown(browser, f"{server.uri}/#/experiments/1/runs", (*NAMES, "corpus (", "Train"), "runs") as page:
        names = page.value(f"{found('.ag-row [role=gridcell] a')}.map(link => link.innerText)")
    assert set(names) >= set(NAMES) and "finetune" not in names


def test_the_charts_of_several_runs(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    """Each has two lines, which tell the runs apart."""
    address = f"{server.uri}/#/experiments/1/runs?compareRunsMode=CHART"
    count = sum(map(len, CHARTS.values()))
    with shown(browser, address, ("loss", *NAMES), "runs-charts", TALL, count) as page:
        first = "document.querySelector('.js-plotly-plot')"
        colors = page.value(f"[...{first}.querySelectorAll('.js-line')].map(line => line.style.stroke)")
    assert len(set(colors)) == 2


def test_a_runs_page(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    """All of it is on the screen, the column at the right with it."""
    address = f"{server.uri}/#/experiments/1/runs/{ids['high_rate']}"
    texts = (
        "Finished",
        "Child runs",
        "finetune",
        "export",
        "1 node of 2 cpu",
        "Logged models (1)",
        "trained on corpus",
    )
    with shown(browser, address, texts, "run") as page:
        right = page.value("Math.max(...['Duration', 'Value'].flatMap(word => "
                           f"{found('body *')}.filter(one => one.childElementCount == 0 && one.innerText == word))"
                           ".map(one => one.getBoundingClientRect().right))")  # fmt: skip
    assert 0 < right < SCREEN[0]


def test_the_charts_of_a_run(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    """The loss comes first, and none is empty; MLflow puts an empty section of its own at the end."""
    address = f"{server.uri}/#/experiments/1/runs/{ids['high_rate']}/model-metrics"
    count = sum(map(len, CHARTS.values()))
    with shown(browser, address, ("loss",), "run-charts", TALL, count) as page:
        assert charts_by_section(text(page).splitlines()) == CHARTS
        assert list(charts_by_section(text(page).splitlines())) == list(CHARTS)
        assert "No data" not in text(page)


def test_the_system_metrics(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    address = f"{server.uri}/#/experiments/1/runs/{ids['high_rate']}/system-metrics"
    with shown(browser, address, ("cpu_utilization_percentage",), "run-system", TALL, 6) as page:
        assert "System metrics (6)" in text(page)
        assert "No data" not in text(page) and "No charts" not in text(page)


def test_the_artifacts(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    """The table of the evaluation as a table; no weights."""
    address = f"{server.uri}/#/experiments/1/runs/{ids['high_rate']}/artifacts/evaluate/table.md"
    with shown(browser, address, ("run.json", "metrics.jsonl", "weights", "perplexity"), "artifacts") as page:
        assert "safetensors" not in text(page)


def test_two_runs_compared(server: Server, browser: Browser, ids: dict[str, str]) -> None:
    """The parameter that differs is an axis, and their numbers stand side by side."""
    runs, experiments = json.dumps([*ids.values()], separators=(",", ":")), json.dumps(["1"])
    address = f"{server.uri}/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}"
    with shown(browser, address, ("Comparing 2 Runs", *NAMES, "quality/perplexity"), "compare", TALL) as page:
        axes = page.value(f"{found('.parcoords .axis-title, .parcoords text')}.map(each => each.textContent)")
    assert "recipe.lr" in axes and "loss/train" in axes


def test_the_model_points_to_the_export(server: Server, browser: Browser) -> None:
    """It says where the files are and how it measures."""
    (model,) = [each for each in MlflowClient(server.uri).search_logged_models(["1"]) if each.name == "low_rate"]
    texts = ("low_rate", "not in MLflow", "perplexity_after", "llmpipe finetune")
    with shown(browser, f"{server.uri}/#/experiments/1/models/{model.model_id}", texts, "model", TALL) as page:
        assert model.tags["export.path"] in text(page)

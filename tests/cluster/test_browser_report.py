"""The report in a real Chromium: it fits laptop and phone, asks nobody for anything, and nothing fails in it."""

import os
import sys
from itertools import product
from pathlib import Path

import pytest
from browser import LAPTOP, PHONE, SCREENS, Browser

from llmpipe.report.page import report

sys.path.append(str(Path(__file__).parents[1] / "report"))
from report_project import evaluate, export, make_run

pytestmark = pytest.mark.skipif("LLMPIPE_CLUSTER" not in os.environ, reason="a browser's pages: make test-cluster")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page on one run, and on two."""
    project = tmp_path_factory.mktemp("project")
    first, second = make_run(project, "tiny_llama"), make_run(project, "a_second_run_with_a_long_name", lr=0.5)
    for run in (first, second):
        evaluate(run)
        export(run)
    told = {"one": [first], "two": [first, second]}
    for name, runs in told.items():
        report(runs, project / f"{name}.html")
    return {name: project / f"{name}.html" for name in told}


@pytest.mark.parametrize(("name", "size", "dark"), [*product(("one", "two"), (LAPTOP, PHONE), (False, True))])
def test_the_report_fits(
    name: str, size: tuple[int, int], dark: bool, pages: dict[str, Path], browser: Browser
) -> None:
    with browser.page(size, dark) as page:
        page.go(pages[name].as_uri())
        page.value("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.value("document.documentElement.scrollWidth") <= size[0]
        assert page.problems == []
        assert page.requests == [pages[name].as_uri(), "data:,"] or page.requests == [pages[name].as_uri()]
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) < 384) is dark
        texts = "[...document.querySelectorAll('svg text:not(:empty)')].map(one => one.getBoundingClientRect().height)"
        assert min(page.value(texts)) >= 10  # pixels: small, but to be read
        if SCREENS:
            page.screenshot(SCREENS / f"report-{name}-{size[0]}-{'dark' if dark else 'light'}.png")

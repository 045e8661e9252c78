"""The report in a real Chromium: it fits laptop and phone, asks nobody for anything, and nothing fails in it."""

import os
import sys
from itertools import product
from pathlib import Path

import pytest
from browser import LAPTOP, PHONE, SCREENS, Browser

from llmpipe.report.curves import QUANTITIES
from llmpipe.report.page import report

sys.path.append(str(Path(__file__).parents[1] / "report"))
from report_project import make_full_run

pytestmark = pytest.mark.skipif("LLMPIPE_CLUSTER" not in os.environ, reason="a browser's pages: make test-cluster")


LINES = "[...document.querySelectorAll('#curves svg')].map(one => [...one.querySelectorAll('.curve')].map(%s))"
"""JavaScript: something of each line of each chart."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page on one run, and on two that went otherwise; of each there is all that a run can have."""
    project = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)  # as the workflow makes it: paths count from there
        first = make_full_run(Path(), "tiny_llama")
        second = make_full_run(Path(), "a_second_run_with_a_long_name", seed=1, lr=0.003)
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
        charts = page.value(LINES % "line => [line.getAttribute('class'), line.getAttribute('d')]")
        assert len(charts) == len(QUANTITIES)
        if name == "two":
            for chart in charts:
                first, second = ({path for kind, path in chart if color in kind.split()} for color in ("c0", "c1"))
                assert first and second and not first & second
        if SCREENS:
            page.screenshot(SCREENS / f"report-{name}-{size[0]}-{'dark' if dark else 'light'}.png")

"""A report: one page of HTML that needs nothing beside it, on one run or comparing several."""

from pathlib import Path
from string import Template

import llmpipe
from llmpipe.files import write_text
from llmpipe.report import provenance, results
from llmpipe.report.figures import summary
from llmpipe.report.gather import Run, read_runs
from llmpipe.report.html import run_name, text

HERE = Path(__file__).parent
SECTIONS = {
    "Key figures": results.numbers,
    "Settings": results.settings,
    "Curves": results.curves,
    "Evaluation": results.evaluation,
    "Verification": provenance.verification,
    "Data": provenance.data,
    "Lineage": provenance.origins,
    "Commands": provenance.commands,
}


def report(folders: list[Path], output: Path) -> None:
    """Write the report on these runs."""
    write_text(output, page(read_runs(folders)))


def page(runs: list[Run]) -> str:
    """The report as text: the same for the same files."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    head = "".join(
        f"<p>{run_name(number, run.name) + ': ' if len(runs) > 1 else ''}{text(summary(run))}</p>"
        for number, run in enumerate(runs)
    )
    names = [(name.lower().replace(" ", "-"), name, make(runs)) for name, make in SECTIONS.items()]
    return Template((HERE / "page.html").read_text()).substitute(
        title=text(title),
        style=(HERE / "page.css").read_text(),
        script=(HERE / "page.js").read_text(),
        summary=head,
        links="".join(f'<a href="#{anchor}">{name}</a>' for anchor, name, _ in names),
        sections="".join(f'<section id="{anchor}"><h2>{name}</h2>{body}</section>' for anchor, name, body in names),
        version=llmpipe.__version__,
    )

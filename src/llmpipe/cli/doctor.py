"""llmpipe doctor."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from llmpipe.cli import URI_VARIABLE, with_log

if TYPE_CHECKING:
    from llmpipe.doctor.finding import Finding

COLORS = {"ok": "green", "note": "yellow", "mend": "red"}


@click.command()
@click.option("--uri", envvar=URI_VARIABLE, help="MLflow's tracking store.  [default: config/config.yaml's]")
@with_log
@click.pass_context
def command(ctx: click.Context, uri: str | None) -> None:
    """Tell what this machine can do, and what to mend, in ten seconds.

    A line for each thing: ok; note, something optional is missing or small; mend, something needed is broken. Exit
    status 1 if there is something to mend.

    \b
    Example:
      llmpipe doctor --uri sqlite:///mlflow.db
    """
    from llmpipe.doctor.doctor import examine

    findings = examine(Path(), uri)
    for finding in findings:
        click.echo(line(finding))
    to_mend = sum(finding.verdict == "mend" for finding in findings)
    click.echo(f"\n{to_mend or 'nothing'} to mend")
    ctx.exit(1 if to_mend else 0)


def line(finding: "Finding") -> str:
    """A finding as text."""
    advice = f"\n{'':20}→ {finding.advice}" if finding.advice else ""
    verdict = click.style(f"{finding.verdict:<5}", fg=COLORS[finding.verdict], bold=True)
    return f"{verdict} {finding.name:<13} {finding.found}{advice}"

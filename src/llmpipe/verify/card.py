"""The verification card: what was compared, how far apart it was, what was allowed; the trainer asks for a passing one.

    {"verdict": "pass" | "fail", "subject": {"path", "digest"}, "reference": {"path", "kind", "digest"},
     "checks": [{"name", "value", "limit", "verdict", "detail"}], "first_difference": null | text, "llmpipe": version}

`NAME.json`, with `NAME.md` and `NAME.html` beside it; a failing card is `NAME.failed.json` and no `NAME.json`.
"""

import html
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import llmpipe
from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.files import write_json, write_text

FORMS = (".json", ".md", ".html")


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a card."""

    name: str
    value: float | None
    """What was measured; None if it could not be."""
    limit: float | None
    verdict: Literal["pass", "fail", "not run"]
    detail: str
    """In a few words, what the row means and what was found."""


Findings = tuple[list[Check], str | None]
"""Rows of a card, and the first difference among them."""


def at_most(name: str, value: float | None, limit: float, detail: str) -> Check:
    """The check that a value does not exceed its limit; no value, or one that is no number, fails."""
    if value is None or not math.isfinite(value):
        return Check(name, None, limit, "fail", detail)
    return Check(name, value, limit, "pass" if value <= limit else "fail", detail)


def make_card(
    subject: dict[str, Any], reference: dict[str, Any], checks: list[Check], first_difference: str | None
) -> dict[str, Any]:
    """The card of these checks; one that failed fails the card."""
    return {
        "verdict": "fail" if first_difference or any(check.verdict == "fail" for check in checks) else "pass",
        "subject": subject,
        "reference": reference,
        "checks": [asdict(check) for check in checks],
        "first_difference": first_difference,
        "llmpipe": llmpipe.__version__,
    }


def write_card(card: dict[str, Any], output: Path) -> Path:
    """Write a card in its three forms, remove the card that stood there before, and return its JSON file's path."""
    passed, failed = output.with_suffix(""), output.with_suffix(".failed")
    stem, stale = (passed, failed) if card["verdict"] == "pass" else (failed, passed)
    for form in FORMS:
        Path(f"{stale}{form}").unlink(missing_ok=True)
    write_text(Path(f"{stem}.md"), card_markdown(card))
    write_text(Path(f"{stem}.html"), card_html(card))
    write_json(Path(f"{stem}.json"), card)
    return Path(f"{stem}.json")


def card_markdown(card: dict[str, Any]) -> str:
    """The card as a page of Markdown."""
    head, rows = _head(card), _rows(card)
    lines = [f"# Verification: {card['verdict'].upper()}", "", *(f"- {name}: {value}" for name, value in head), ""]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines += ["| " + " | ".join(row) + " |" for row in (escaped[0], ["---"] * 5, *escaped[1:])]
    return "\n".join(lines) + "\n"


def card_html(card: dict[str, Any]) -> str:
    """The card as one self-contained page of HTML, for Snakemake's report."""
    color = {"pass": "#1a7f37", "fail": "#cf222e", "not run": "#57606a"}
    head = "".join(f"<li>{html.escape(name)}: {html.escape(value)}</li>" for name, value in _head(card))
    title, *rows = _rows(card)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[:3])
        + f'<td style="color:{color[row[3]]};font-weight:bold">{row[3]}</td><td>{html.escape(row[4])}</td></tr>'
        for row in rows
    )  # fmt: skip
    return f"""<!doctype html>
<meta charset="utf-8"><title>Verification: {card["verdict"]}</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em;max-width:75em}}table{{border-collapse:collapse}}
th,td{{border-bottom:1px solid #d0d7de;padding:.4em .8em;text-align:left;vertical-align:top}}
td:nth-child(2),td:nth-child(3){{font-family:ui-monospace,monospace;white-space:nowrap}}</style>
<h1>Verification: <span style="color:{color[card["verdict"]]}">{card["verdict"]}</span></h1>
<ul>{head}</ul>
<table><tr>{"".join(f"<th>{cell}</th>" for cell in title)}</tr>{body}</table>
"""


def passed_card(directory: Path) -> dict[str, Any] | None:
    """The passing card beside a directory that speaks of its present manifest's digest; None if there is none."""
    return _card_of(manifest.read(directory).digest, directory.parent)


def require_card(directory: Path) -> None:
    """UserError, with the command to run, unless a checkpoint, or rank files and their checkpoint, are verified."""
    if passed_card(directory) is None:
        raise UserError(f"{directory} is not verified: {_how(directory, manifest.read(directory))}")
    made = manifest.read(directory)
    if made.kind != "rank_files":
        return
    if _card_of(made.source["checkpoint"], directory.parent) is None:
        beside = directory.parent / "checkpoint"
        raise UserError(
            f"the checkpoint that {directory} was made from has no passing card in {directory.parent}: run"
            f" `llmpipe verify {beside} --reference SOURCE --output {default_output(beside)}`"
        )


def default_output(directory: Path) -> Path:
    """Where a directory's card stands: beside it."""
    name = "verify.json" if directory.name == "checkpoint" else f"{directory.name}.verify.json"
    return directory.parent / name


def _card_of(digest: str, folder: Path) -> dict[str, Any] | None:
    for path in sorted(folder.glob("*verify.json")):
        card = json.loads(path.read_text())
        if card["verdict"] == "pass" and card["subject"]["digest"] == digest:
            return card
    return None


def _how(directory: Path, made: manifest.Manifest) -> str:
    output = default_output(directory)
    failed = output.with_suffix(".failed.json")
    why = (
        f"its last verification failed, see {failed.with_suffix('.md')}; mend it, then" if failed.is_file() else "first"
    )
    reference = directory.parent / "checkpoint" if made.kind == "rank_files" else "SOURCE"
    return f"{why} run `llmpipe verify {directory} --reference {reference} --output {output}`"


def _head(card: dict[str, Any]) -> list[tuple[str, str]]:
    subject, reference = card["subject"], card["reference"]
    head = [
        ("subject", f"{subject['path']} ({subject['digest'][:12]})"),
        ("reference", f"{reference['path']} ({reference['kind']})"),
        ("llmpipe", card["llmpipe"]),
    ]
    return head + ([("first difference", card["first_difference"])] if card["first_difference"] else [])


def _rows(card: dict[str, Any]) -> list[list[str]]:
    rows = [["check", "measured", "limit", "verdict", "what it means"]]
    for check in card["checks"]:
        rows.append(
            [check["name"], _number(check["value"]), _number(check["limit"]), check["verdict"], check["detail"]]
        )
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else f"{value:,}"

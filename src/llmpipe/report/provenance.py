"""What runs were made of and how, as HTML: verification cards, data, lineage, commands."""

from collections.abc import Callable
from typing import Any

from llmpipe.report.chart import bars
from llmpipe.report.commands import stages
from llmpipe.report.figures import duration
from llmpipe.report.gather import Dataset, Run
from llmpipe.report.html import count, folded, note, run_name, sha, table, text, verdict
from llmpipe.report.lineage import Step, lineage
from llmpipe.report.scale import short


def of_each(runs: list[Run], shown: Callable[[Run], str]) -> str:
    """What is shown of each run, under its name where there are several; what is the same of some, once."""
    names: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        names.setdefault(shown(run), []).append(run_name(number, run.name))
    heads = [f"<h3>{', '.join(own)}</h3>" if len(runs) > 1 else "" for own in names.values()]
    return "".join(head + content for head, content in zip(heads, names, strict=True))


def verification(runs: list[Run]) -> str:
    """Each card once, whichever runs started from those weights."""
    cards = {path.resolve(): card for run in runs for path, card in run.cards.items()}
    if not cards:
        return note("No verification card lies beside the weights that training started from.")
    return "".join(map(_card, cards.values()))


def _card(card: dict[str, Any]) -> str:
    subject, reference = card.get("subject") or {}, card.get("reference") or {}
    rows = [
        [
            text(check["name"]),
            _measured(check.get("value")),
            _measured(check.get("limit")),
            verdict(check.get("verdict", "not run")),
            text(check.get("detail", "")),
        ]
        for check in card["checks"]
    ]
    compared = f"{text(str(subject.get('path', '')))} with {text(str(reference.get('path', '')))}"
    first = card.get("first_difference")
    passed = sum(check.get("verdict") == "pass" for check in card["checks"])
    title = f"{verdict(card.get('verdict', 'not run'))} {compared}, {passed} of {len(rows)} checks passed"
    shown = table(["check", "measured", "allowed", "verdict", "what it means"], rows, "card")
    return folded(title, (note(f"First difference: {text(first)}") if first else "") + shown)


def _measured(value: float | None) -> str:
    return "" if value is None else short(value) if isinstance(value, float) else f"{value:,}"


def data(runs: list[Run]) -> str:
    """Lengths, packing use and mask share of each dataset of each run."""
    return of_each(runs, lambda run: _datasets(run.datasets))


def _datasets(datasets: list[Dataset]) -> str:
    rows = [
        [f"{text(one.name)}<small>{one.part}, weight {one.weight:g}</small>", *_statistics(one)] for one in datasets
    ]
    head = ["dataset", "documents", "tokens", "tokens in a document", "packing use", "trained tokens"]
    histograms = "".join(
        f"<figure><h3>{text(one.name)} <span class='unit'>documents by length</span></h3>"
        f"{bars(one.statistics.ranges, f'lengths of the documents of {one.name}')}</figure>"
        for one in datasets
        if one.statistics
    )
    return table(head, rows, "data") + f'<div class="charts">{histograms}</div>'


def _statistics(dataset: Dataset) -> list[str]:
    found = dataset.statistics
    if found is None:
        return [f"<small>{dataset.missing}</small>", "", "", "", ""]
    use = "one in each sequence" if found.packing_use is None else f"{found.packing_use:.1%}"
    lengths = (
        f"{found.median:,.0f}<small>median; mean {found.mean:,.1f}, {found.shortest:,} to {found.longest:,}</small>"
    )
    return [f"{found.documents:,}", f"{found.tokens:,}", lengths, use, f"{found.mask_share:.1%}"]


def origins(runs: list[Run]) -> str:
    """Each run's lineage; a chain that several have in common, once."""
    names: dict[tuple[str, str], list[str]] = {}
    for number, run in enumerate(runs):
        for title, steps in lineage(run):
            names.setdefault((title, _chain(steps)), []).append(run_name(number, run.name))
    heads = [f" of {', '.join(own)}" if len(runs) > 1 else "" for own in names.values()]
    return "".join(f"<h4>{text(title)}{head}</h4>{chain}" for head, (title, chain) in zip(heads, names, strict=True))


def _chain(steps: list[Step]) -> str:
    return f'<ol class="chain">{"".join(map(_step, steps))}</ol>'


def _step(step: Step) -> str:
    agrees = '<span class="pass">hashes agree</span>' if step.holds else '<span class="fail">made again since</span>'
    files = [[text(name), sha(digest)] for name, digest in step.files]
    hashes = folded(f"{count(len(files), 'file')}", table(["file", "SHA-256"], files)) if files else ""
    told = ", ".join(part for part in (text(step.told), "" if step.holds is None else agrees) if part)
    return f"<li><b>{step.kind}</b> <code>{text(step.name)}</code> {sha(step.digest)}<small>{told}</small>{hashes}</li>"


def commands(runs: list[Run]) -> str:
    """What was run, what it took, and with which versions."""
    return of_each(runs, lambda run: _commands(run))


def _commands(run: Run) -> str:
    found = stages(run)
    rows = [
        [
            stage.name,
            duration(stage.seconds) if stage.seconds is not None else "",
            f"{stage.peak_mb * 1e6 / (1 << 30):.3g} GiB" if stage.peak_mb else "",
            f"<code>{_command(stage.command)}</code>",
        ]
        for stage in found
    ]
    told = note(f"{text(_versions(run))}.")
    if not rows:
        return told + note(
            "No logs of the stages were found: run by hand, a command keeps one with <code>--log</code>."
        )
    return told + table(["stage", "took", "peak memory", "command, from the project's folder"], rows, "commands")


def _command(words: str) -> str:
    """A command, in which no line ends in the middle of an option's name."""
    return " ".join(f"<span>{text(word)}</span>" if word.startswith("--") else text(word) for word in words.split(" "))


def _versions(run: Run) -> str:
    """What it ran with, and where, as far as it is recorded."""
    record, origin = run.record, run.record.get("origin") or {}
    told = [f"{key} {record[key]}" for key in ("llmpipe", "torch") if record.get(key)]
    told += [f"git commit {origin['git_commit']}"] if origin.get("git_commit") else []
    told += [f"on {origin['host']}"] if origin.get("host") else []
    return ", ".join(told) or "Versions are not recorded"

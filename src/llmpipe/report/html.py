"""Pieces of a page: tables and lists. What comes from files goes through `text`; everything else here is HTML."""

from html import escape as text

COLORS = 6
"""Of the page, c0 to c5, for runs and curves."""


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table that scrolls sideways in its own box where the screen is narrow; cells are HTML."""
    titles = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{title}</summary>{content}</details>"


def sha(digest: str | None) -> str:
    """The beginning of a hash; all of it in its tooltip, and where it is copied."""
    return f'<code class="sha" title="{text(digest)}">{text(digest[:12])}</code>' if digest else ""


def count(number: int, thing: str) -> str:
    """1 file, 2 files."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def verdict(name: str) -> str:
    """pass, fail, not run."""
    return f'<span class="verdict {name.replace(" ", "-")}">{text(name)}</span>'


def note(words: str) -> str:
    return f'<p class="note">{words}</p>'


def run_name(number: int, name: str) -> str:
    """A run's name beside its colour in the charts."""
    return f'<span class="run"><i class="c{number % COLORS}"></i>{text(name)}</span>'


__all__ = ["count", "folded", "note", "run_name", "sha", "table", "text", "verdict"]

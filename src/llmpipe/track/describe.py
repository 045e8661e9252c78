"""A training in a few lines of Markdown, which MLflow shows at the head of its page."""

import shlex
from pathlib import Path
from typing import Any

from llmpipe.files import read_json
from llmpipe.track.subject import is_number
from llmpipe.train.run_folder import MAKE_AGAIN, cards_of, located


def described(folder: Path, record: dict[str, Any]) -> str:
    """What was trained on what and how, whether it was verified, how it measures, where the result is."""
    parts = [_training(record), _verdicts(folder, record), _table(folder / "evaluate" / "table.json")]
    if (folder / "export").is_dir():
        parts.append(f"The exported model is in `{folder / 'export'}`.")
    if command := (record.get("origin") or {}).get("command"):
        parts.append(f"```\n{in_lines(command)}\n```")
    return "\n\n".join(part for part in parts if part)


def in_lines(command: str) -> str:
    """A shell command with each option on a line: MLflow makes the page as wide as the longest line."""
    lines: list[str] = []
    for word in shlex.split(command):
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def _training(record: dict[str, Any]) -> str:
    recipe, model = record.get("recipe") or {}, (record.get("model") or {}).get("path")
    data = ", ".join(f"{Path(part['prefix']).name} x {part.get('weight', 1):g}" for part in record.get("data") or [])
    if not recipe or not model:
        return ""
    sizes = f"{recipe.get('steps')} steps of {recipe.get('global_batch')} sequences x {recipe.get('seq_len')} tokens"
    rate = f"learning rate {recipe.get('lr')}, {recipe.get('precision')}"
    return f"`{model}` trained on {data}: {sizes}, {rate}."


def _verdicts(folder: Path, record: dict[str, Any]) -> str:
    """What the cards say of the weights that it started from."""
    model = (record.get("model") or {}).get("path")
    cards = cards_of(located(folder, model)) if model else {}
    told = [
        f"{path.stem} **{read_json(path, MAKE_AGAIN).get('verdict', 'none')}**"
        for path in cards.values()
        if path.suffix == ".json"
    ]
    return f"Cards: {', '.join(told)}." if told else ""


def _table(path: Path) -> str:
    rows = read_json(path, MAKE_AGAIN)["rows"] if path.is_file() else []
    cells = [
        f"| {row['task']} | {row['metric']} | {_number(row.get('before'))} | {_number(row.get('after'))} |"
        for row in rows
    ]
    return "\n".join(["| task | metric | before | after |", "|---|---|---|---|", *cells]) if cells else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else ""

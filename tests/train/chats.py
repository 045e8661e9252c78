"""Chats of a question and an answer, as the tests' tiny Llama is trained on."""

import json
from pathlib import Path

from click.testing import CliRunner

from llmpipe.cli.tokenize import command as tokenize

QUESTIONS = [f"Option {i}{' or so' * (i % 3)}?" for i in range(12)]
ANSWERS = [f"{i * 7} arguments{', a default' * (i % 4)}." for i in range(12)]


def make_chats(model: Path, folder: Path) -> Path:
    """The dataset of these chats, in Llama 2's template."""
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        folder / "chats.jsonl",
        "--chat",
        "--template",
        "llama2",
        "--tokenizer",
        model,
        "--output",
        folder / "d",
    ]
    result = CliRunner().invoke(tokenize, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "d"

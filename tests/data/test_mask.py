"""llmpipe inspect --mask: chats with what is trained marked, written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from click.testing import CliRunner
from data_help import dataset, train

from llmpipe.cli.inspect import command as inspect
from llmpipe.cli.tokenize import command as tokenize
from llmpipe.data.mask import masked_documents
from llmpipe.errors import UserError


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    train(tmp_path / "tokenizer/tokenizer.model", 400)
    rows = [{"question": "2 + 2?", "answer": "It is [4].\nYes"}, {"question": "é 天?", "answer": "天"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--chat", "--template", "llama2", "--max-length", 60, "--tokenizer", tmp_path / "tokenizer"]
    run(tokenize, tmp_path / "c.jsonl", *options, "--output", tmp_path / "d")
    return tmp_path / "d"


def test_what_is_trained_stands_in_brackets(chats: Path) -> None:
    text = run(inspect, chats, "--mask", "--documents", 2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(chats.parent / "tokenizer/tokenizer.model"))
    prompt, whole = (len(model.encode(f"[INST] 2 + 2? [/INST]{answer}")) for answer in ("", " It is [4].\nYes "))
    assert f"\ndocument 0, {whole + 2} tokens, {whole - prompt + 1} of them trained\n" in text
    assert "\n<s>[INST] 2 + 2? [/INST]⟦ It is [4].\nYes </s>⟧\n" in text
    assert text.endswith("\n<s>[INST] é 天? [/INST]⟦ 天 </s>⟧\n")
    assert "  chats       fields of a known kind, template llama2\n" in text
    assert "  over long   more than 60 tokens: 0 split at turns, 0 left out\n" in text


def test_or_in_colour_on_a_terminal(chats: Path) -> None:
    text = masked_documents(chats, None, 2, colours=True)
    assert text.endswith("\n<s>[INST] é 天? [/INST]\x1b[32m\x1b[4m 天 </s>\x1b[0m")


def test_what_cannot_be_shown_is_said(chats: Path, tmp_path: Path) -> None:
    dataset(tmp_path / "text", [3])
    with pytest.raises(UserError, match="text has no roles: it is text, and all of it is trained"):
        run(inspect, tmp_path / "text", "--mask")
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"not at .*/tokenizer/tokenizer\.model any more: name it with --tokenizer"):
        run(inspect, chats, "--mask")
    assert "⟦ 天 </s>⟧" in run(inspect, chats, "--mask", "--tokenizer", tmp_path / "moved")

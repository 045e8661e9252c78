"""Chats through `llmpipe tokenize`: the dataset, its roles, what is too long, what is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_help import CHATS, byte_level, say, sentencepiece
from click.testing import CliRunner
from transformers import AutoTokenizer

from llmpipe.cli.merge import command as merge
from llmpipe.cli.tokenize import command as tokenize
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("chats"))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def made(prefix: Path) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
    """Documents, roles and manifest."""
    tokens, roles, facts = Reader(prefix), Reader(prefix.with_name(prefix.name + ".roles")), manifest.read(prefix)
    assert facts and roles.dtype == np.uint8 and roles.sizes.tolist() == tokens.sizes.tolist()
    return *([reader.read(i).tolist() for i in range(reader.num_documents)] for reader in (tokens, roles)), facts


def ids(folder: Path, messages: list[dict[str, Any]]) -> list[int]:
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def test_each_chat_is_a_document_with_roles(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", [{"messages": chat} for chat in CHATS.values()])
    run(tokenize, source, "--chat", "--tokenizer", folder, "--output", tmp_path / "d", "--workers", 1)
    documents, roles, facts = made(tmp_path / "d")
    assert documents == [ids(folder, chat) for chat in CHATS.values()]
    stop = ids(folder, CHATS["one exchange"])[-2]  # <|im_end|>, before a newline
    for document, own, chat in zip(documents, roles, CHATS.values(), strict=True):
        stops = [role for token, role in zip(document, own, strict=True) if token == stop]
        assert stops.count(2) == sum(turn["role"] == "assistant" for turn in chat)
    assert (facts["corpus_kind"], facts["template"], facts["documents"]) == ("chat", "tokenizer", len(CHATS))
    assert sorted(facts["files"]) == ["d.bin", "d.idx", "d.roles.bin", "d.roles.idx"]


def test_a_corpus_file_says_which_keys_and_which_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentencepiece(tmp_path / "tokenizer", None, add_bos_token=True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", [{"question": "2 + 2?", "answer": "It is 4."}] * 3)
    (tmp_path / "c.yaml").write_text(
        "files: [c.jsonl]\nkind: chat\nfields: {user: question, assistant: answer}\ntemplate: llama2\n"
    )
    run(tokenize, "c.yaml", "--tokenizer", tokenizer, "--output", "d")
    model = AutoTokenizer.from_pretrained(tokenizer)
    documents, _, _ = made(tmp_path / "d")
    assert model.decode(documents[2]) == "<s> [INST] 2 + 2? [/INST] It is 4. </s>"


LONG = say("a " * 8, "b " * 9, "c " * 60, "d " * 9, "e", "f", "g", "h", system="Be brief.")


def test_over_long_chats_are_split_at_turns_and_counted(folder: Path, tmp_path: Path) -> None:
    """The limit has room for the system's turn and two short exchanges; the second exchange never fits."""
    turns, system = LONG[1:], LONG[:1]
    expected = [ids(folder, [*system, *part]) for part in (turns[:2], turns[4:])]
    limit = max(map(len, expected))
    assert len(ids(folder, [*system, *turns[2:4]])) > limit >= len(ids(folder, say("x", "y")))
    source = write(
        tmp_path / "c.jsonl", [{"messages": say("x", "y")}, {"messages": LONG}, {"messages": say("z " * 90, "!")}]
    )
    arguments = [source, "--chat", "--tokenizer", folder, "--max-length", limit]
    told = run(tokenize, *arguments, "--output", tmp_path / "d")
    documents, _, facts = made(tmp_path / "d")
    assert documents == [ids(folder, say("x", "y")), *expected]
    assert (facts["split_chats"], facts["dropped_chats"], facts["max_length"]) == (1, 2, limit)
    assert "1 are split at turns, and 2, or parts of such, are left out" in told
    for worker in (1, 3):
        for part in (1, 2, 3):
            run(tokenize, *arguments, "--output", tmp_path / f"p{worker}", "--part", f"{part}/3", "--workers", worker)
        parts = [tmp_path / f"p{worker}.part-{part}-of-3" for part in (3, 1, 2)]
        run(merge, *parts, "--output", tmp_path / "joined")
        for suffix in (".bin", ".idx", ".roles.bin", ".roles.idx"):
            ours, whole = (prefix.with_name(prefix.name + suffix) for prefix in (tmp_path / "joined", tmp_path / "d"))
            assert ours.read_bytes() == whole.read_bytes()
        joined = manifest.read(tmp_path / "joined")
        assert joined and (joined["split_chats"], joined["dropped_chats"]) == (1, 2)


def test_over_long_chats_may_be_left_out_whole(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", [{"messages": say("x", "y")}, {"messages": LONG}])
    (tmp_path / "c.yaml").write_text("files: [c.jsonl]\nkind: chat\nmax_length: 60\nover_long: drop\n")
    run(tokenize, "c.yaml", "--tokenizer", folder, "--output", "d")
    documents, _, facts = made(tmp_path / "d")
    assert documents == [ids(folder, say("x", "y"))]
    assert (facts["split_chats"], facts["dropped_chats"]) == (0, 1)


def test_a_corpus_of_over_long_chats_alone_says_so(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", [{"messages": say("z " * 90, "!")}] * 3)
    arguments = [source, "--chat", "--tokenizer", folder, "--max-length", 20, "--output", tmp_path / "d"]
    with pytest.raises(UserError, match=r"corpus is empty: .*; 3 chats, or parts of such, are longer than max_length"):
        run(tokenize, *arguments)


def test_easylms_grammar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BOS without loss, the fields, EOS with loss; a field in brackets has none."""
    folder = sentencepiece(tmp_path / "tokenizer", None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", [{"q": "What", "p": "is it?", "a": "no"}])
    (tmp_path / "c.yaml").write_text('files: [c.jsonl]\nkind: chat\nfields: "[q+p],a"\n')
    run(tokenize, "c.yaml", "--tokenizer", folder, "--output", "d")
    import sentencepiece as spm

    model = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    question, answer = model.encode("What is it?"), model.encode("no")
    documents, roles, _ = made(tmp_path / "d")
    assert documents == [[1, *question, *answer, 2]]
    assert roles == [[0] + [1] * len(question) + [2] * (len(answer) + 1)]


def test_a_bad_row_is_named_or_skipped(folder: Path, tmp_path: Path) -> None:
    good, bad = {"messages": say("x", "y")}, {"messages": [*say("x", "y"), {"role": "robot", "content": ""}]}
    source = write(tmp_path / "c.jsonl", [good, bad, good])
    arguments = [source, "--chat", "--tokenizer", folder, "--output", tmp_path / "d"]
    with pytest.raises(UserError) as error:
        run(tokenize, *arguments)
    assert str(error.value).startswith(
        f"{source}, line 2 in turn 3 has \"robot\" under 'role', but it has to be one of"
    )
    assert not (tmp_path / "d.idx").exists() and not (tmp_path / "d.roles.idx").exists()
    run(tokenize, *arguments, "--skip-bad", 1)
    documents, _, facts = made(tmp_path / "d")
    assert len(documents) == 2 and facts["rejected_rows"] == 1


@pytest.mark.parametrize("fields", ["{}", '"[question],answer"'])
def test_half_of_a_surrogate_pair_is_named(fields: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sentencepiece(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", [{"question": "a", "answer": "b"}, {"question": "\ud83d", "answer": "b"}])
    (tmp_path / "c.yaml").write_text(f"files: [c.jsonl]\nkind: chat\nfields: {fields}\n")
    with pytest.raises(UserError, match=r"c\.jsonl, line 2 has half of a surrogate pair in its text"):
        run(tokenize, "c.yaml", "--tokenizer", folder, "--output", "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fields: {usr: q, assistant: a}", "fields has the unknown key 'usr': did you mean 'user'?"),
        ("template: lama2", "template 'lama2' is not known: did you mean 'llama2'?"),
        ("fields: '[q],a'\ntemplate: llama2", "is EasyLM's grammar, which says it all: leave out the template"),
        ("kind: text\ntemplate: llama2", "template is for chats, and this corpus has kind: text; say kind: chat"),
        ("max_length: 1", "max_length is 1, but has to be 2 or more"),
    ],
)
def test_a_corpus_file_that_cannot_be(text: str, message: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", [{"messages": say("x", "y")}])
    (tmp_path / "c.yaml").write_text("files: [c.jsonl]\n" + (text if "kind" in text else f"kind: chat\n{text}") + "\n")
    with pytest.raises(UserError) as error:
        run(tokenize, "c.yaml", "--tokenizer", folder, "--output", "d")
    assert message in str(error.value)

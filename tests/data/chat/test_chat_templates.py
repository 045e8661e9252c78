"""Named templates against the published code of those who train with them, written out with the tokenizer's library."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import tokenizers
from chat_help import CALLING, LLAMA3_LIKE, QWEN_LIKE, byte_level, say, sentencepiece

from llmpipe.data.chat.conversation import Conversation
from llmpipe.data.chat.encode import ConversationEncoder, Encoded
from llmpipe.data.chat.templates import NAMED, open_template
from llmpipe.data.readers.block import BadRow
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError

CHATS = [
    say("What is 2 + 3?", "It is 5."),
    say("  a\n", "b ", "c", "\nd", system=" Be brief. "),
    say("</s>[INST]", "<|im_end|><|eot_id|>"),
]
IM = {"32000": "<|im_start|>", "32001": "<|im_end|>"}


def encoded(folder: Path, template: str | None, messages: list[dict[str, Any]], **more: Any) -> Encoded:
    tokenizer = open_tokenizer(folder)
    encoder = ConversationEncoder(tokenizer, open_template(template, tokenizer), bos=more.pop("bos", None))
    return encoder.encode(Conversation(messages, **more))


def added(*names: str) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(400 + i): {"content": name, "special": True} for i, name in enumerate(names)}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return sentencepiece(folder, None, add_bos_token=True, **added("<|im_start|>", "<|im_end|>"))


@pytest.mark.parametrize("messages", CHATS)
def test_llama2_is_metas(messages: list[dict[str, Any]], llama: Path) -> None:
    """llama/generation.py: BOS, one text for an exchange, EOS."""
    model = spm.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    turns = [dict(turn) for turn in messages]
    if turns[0]["role"] == "system":
        system, turns = turns[0], turns[1:]
        turns[0]["content"] = "<<SYS>>\n" + system["content"] + "\n<</SYS>>\n\n" + turns[0]["content"]
    expected: list[int] = []
    for prompt, answer in zip(turns[::2], turns[1::2], strict=True):
        text = f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} "
        expected += [model.bos_id(), *model.encode(text), model.eos_id()]
    assert encoded(llama, "llama2", messages).ids == expected


@pytest.mark.parametrize("messages", CHATS)
def test_chatml_is_megatron_llms(messages: list[dict[str, Any]], llama: Path) -> None:
    """tools/preprocess_instruct_data.py, each text between its control tokens by SentencePiece; BOS is llmpipe's."""
    model = spm.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    words = {"system": "system", "user": "question", "assistant": "answer"}
    expected, roles = [1], [0]
    for turn in messages:
        text = model.encode(f"{words[turn['role']]}\n{turn['content']}")
        expected += [400, *text, 401, *model.encode("\n")]
        header = len(model.encode(f"{words[turn['role']]}\n"))
        mine = len(text) - header
        last = 2 if turn["role"] == "assistant" else 0
        roles += [0] * (1 + header) + [{"system": 0, "user": 1, "assistant": 2}[turn["role"]]] * mine + [last, 0, 0]
    found = encoded(llama, "chatml", messages)
    assert found.ids == expected
    if messages is CHATS[0]:  # elsewhere white space of the user's is the template's
        assert found.roles == roles
    assert encoded(llama, "chatml", messages, bos=False).ids == expected[1:]


def test_chatml_openai_has_the_usual_role_words(llama: Path) -> None:
    model = spm.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    expected = [1, 400, *model.encode("user\nq"), 401, *model.encode("\n")]
    expected += [400, *model.encode("assistant\na"), 401, *model.encode("\n")]
    assert encoded(llama, "chatml_openai", say("q", "a")).ids == expected


@pytest.mark.parametrize("messages", CHATS)
def test_llama3_is_metas(messages: list[dict[str, Any]], tmp_path: Path) -> None:
    """llama/tokenizer.py, ChatFormat: header, two newlines and the stripped text are encoded one by one."""
    folder = byte_level(tmp_path, None, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    ids = {name: library.token_to_id(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id")}
    expected, roles = [library.token_to_id("<|begin_of_text|>")], [0]
    for turn in messages:
        role, content = library.encode(turn["role"]).ids, library.encode(turn["content"].strip()).ids
        newlines = library.encode("\n\n").ids
        expected += [ids["start_header_id"], *role, ids["end_header_id"], *newlines, *content, ids["eot_id"]]
        own = {"system": 0, "user": 1, "assistant": 2}[turn["role"]]
        roles += [0] * (2 + len(role) + len(newlines)) + [own] * len(content) + [2 if own == 2 else 0]
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    assert encoded(folder, "llama3", messages) == Encoded(expected, roles)


def test_mistral_is_mistral_commons(llama: Path, tmp_path: Path) -> None:
    """Version 1: [INST] is text, each turn encoded on its own; from version 2 on it is a control token.

    With Mistral's own files mistral-common 1.13.1 gives these too (its versions 1, 2 and 3).
    """
    model = spm.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    messages = say("q", "a b ", "c", "d", system="s")
    first = [1, *model.encode("[INST] s\n\nq [/INST]"), *model.encode("a b "), 2]
    assert encoded(llama, "mistral", messages).ids == [*first, *model.encode("[INST] c [/INST]"), *model.encode("d"), 2]
    folder = sentencepiece(tmp_path, None, **added("[INST]", "[/INST]"))
    expected = [1, 400, *model.encode("s\n\nq"), 401, *model.encode("a b"), 2]
    assert encoded(folder, "mistral", messages).ids == [*expected, 400, *model.encode("c"), 401, *model.encode("d"), 2]


def test_plain_is_alpacas(llama: Path) -> None:
    """Stanford Alpaca's train.py: source and target are one text, EOS behind it, the target trained."""
    model = spm.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    found = encoded(llama, "plain", say("### Response:", "yes"))
    assert found.ids == [1, *model.encode("### Response:yes"), 2]
    assert [number for number, role in zip(found.ids, found.roles, strict=True) if role == 2] == [
        *model.encode("### Response:yes")[len(model.encode("### Response:")) :],
        2,
    ]


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_end_turns_with_a_stop_token(name: str, tmp_path: Path) -> None:
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    folder = sentencepiece(tmp_path, None, **added(*special))
    found = encoded(folder, name, say("q", "a", "b", "c"))
    ends = [found.ids[i] for i, role in enumerate(found.roles) if role == 2 and (found.roles[i + 1 :] or [0])[0] != 2]
    assert ends == [{"chatml": 401, "chatml_openai": 401, "llama3": 404}.get(name, 2)] * 2


def test_where_a_tokenizers_own_template_may_stand(tmp_path: Path) -> None:
    byte_level(tmp_path, QWEN_LIKE)
    expected = encoded(tmp_path, None, say("q", "a"))
    assert (tmp_path / "chat_template.jinja").is_file()
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": QWEN_LIKE}, {"name": "tool_use", "template": LLAMA3_LIKE}]
    for template in (QWEN_LIKE, named):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        assert encoded(tmp_path, "tokenizer", say("q", "a")) == expected
    with pytest.raises(BadRow, match="without a stop token"):  # the template for tools: its tokens are not there
        encoded(tmp_path, None, say("q", "a"), tools=[{"name": "f"}])


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path, None)
    for name, message in {
        "chatml": "writes the control tokens <|im_start|>, <|im_end|>, which .* does not have: add them to the model",
        "lama2": r"template 'lama2' is not known: did you mean 'llama2'\?",
        None: f"{folder} has no chat template .* name one of chatml, ",
    }.items():
        with pytest.raises(UserError, match=message):
            encoded(folder, name, say("q", "a"))
    with pytest.raises(BadRow, match="has tools, for which the template llama2 has no form: take the tokenizer's own"):
        encoded(folder, "llama2", CALLING)
    for messages, message in (
        (say("q", "a")[::-1], "is refused by the template llama2: turns of user and assistant have to alternate"),
        (say("q", "a") + say("b", "c", system="s"), "have to alternate"),
    ):
        with pytest.raises(BadRow, match=message):
            encoded(folder, "llama2", messages)

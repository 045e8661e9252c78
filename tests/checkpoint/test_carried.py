"""What goes along with the weights wherever these go: templates as transformers saves them, a tokenizer from above."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmpipe.checkpoint import carried, manifest
from llmpipe.checkpoint.convert import Target, convert, shard
from llmpipe.checkpoint.hub import HubFile, Repository
from llmpipe.checkpoint.hub_choice import choose
from llmpipe.export.export import export
from llmpipe.layout import Stages

TEMPLATES = {
    "default": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "tool_use": "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}",
}
FILES = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")


@pytest.fixture
def chat(hf: Path, tokenizer_model: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer transformers saved, with two templates; and beside it files that nobody needs."""
    shutil.copy(tokenizer_model, hf / "tokenizer.model")
    convert(hf, tmp_path / "first")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(hf)
    assert all((hf / name).is_file() for name in FILES)
    (hf / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["default"]}))
    (hf / "additional_chat_templates/notes.txt").write_text("mine")
    (hf / "preprocessor_config.json").write_text("{}")
    return hf


def test_templates_go_to_the_checkpoint_the_rank_files_and_the_export(chat: Path, tmp_path: Path) -> None:
    convert(chat, tmp_path / "out")
    shard(tmp_path / "out", tmp_path / "ranks", 2, Stages(1))
    export(tmp_path / "out", tmp_path / "export")
    for path in (tmp_path / "out", tmp_path / "ranks", tmp_path / "export"):
        names = {name for name in manifest.check(path).files if "template" in name}
        assert names == {*FILES, "chat_template.json"}
        assert all((path / name).read_bytes() == (chat / name).read_bytes() for name in names)
        assert not (path / "preprocessor_config.json").exists()
        assert AutoTokenizer.from_pretrained(path).chat_template == TEMPLATES


def test_templates_are_fetched_from_the_hub() -> None:
    names = ["model.safetensors", "config.json", *FILES, "chat_template.json", "additional_chat_templates/a/b.jinja"]
    repository = Repository("org/name", "0" * 40, {name: HubFile(1, None, "") for name in names})
    assert set(choose(repository)) == {*names[:-1]}


@pytest.mark.parametrize("to", ["hf", "meta", "megatron", "easylm"])
def test_a_tokenizer_one_folder_above_goes_along(
    meta: Path, tokenizer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, to: str
) -> None:
    caplog.set_level("INFO")
    above = tmp_path / "download"
    shutil.copytree(meta, above / "llama-2-7b")
    shutil.copy(tokenizer_model, above / "tokenizer.model")
    shutil.copy(tokenizer_model, above / "notes.txt")
    convert(above / "llama-2-7b", tmp_path / "out", Target(to))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer_model.read_bytes()
    assert not (tmp_path / "out/notes.txt").exists()
    assert f"the tokenizer of {above} is taken" in caplog.messages
    assert manifest.check(tmp_path / "out").files["tokenizer.model"]


def test_a_tokenizer_of_another_name_is_pointed_at(
    meta: Path, tokenizer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tokenizer_model, meta / "tokenizer.model.v3")
    convert(meta, tmp_path / "out")
    message = "the checkpoint has no tokenizer; if tokenizer.model.v3 is it, copy it to tokenizer.model there"
    assert any(line.endswith(message) for line in caplog.messages)


def test_pictures_and_weights_do_not_go_along(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "USE_POLICY.md", "README.md", "model.gguf", "tekken.json", "figure.png"):
        (tmp_path / name).write_text("x")
    assert carried.names(tmp_path) == ["LICENSE.txt", "USE_POLICY.md", "tekken.json"]

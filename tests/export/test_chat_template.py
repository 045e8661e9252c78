"""The template that a model was trained with, as transformers reads it from the export."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmpipe.data.chat.templates import NAMED
from llmpipe.export.chat_template import add_chat_template
from llmpipe.export.export import export

CHAT = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 more?"},
    {"role": "assistant", "content": "7"},
]


def trained_with(run: Path, *templates: str | None) -> None:
    record = json.loads((run / "run.json").read_text())
    record["data"] = [{"prefix": f"corpora/{i}", "weight": 1.0, "template": name} for i, name in enumerate(templates)]
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("template", "asked"),
    [
        # As Meta's llama/generation.py (Llama 2) and mistral-common's version 1 print these turns.
        ("llama2", "<s>[INST] What is 2 + 2? [/INST] 4 </s><s>[INST] And 3 more? [/INST]"),
        ("mistral", "<s>[INST] What is 2 + 2? [/INST] 4</s>[INST] And 3 more? [/INST]"),
    ],
)
def test_transformers_asks_as_the_model_was_trained(run: Path, tmp_path: Path, template: str, asked: str) -> None:
    trained_with(run, template, None)
    export(run, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True) == asked
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith(asked)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`chat_template.jinja` is the template {template} of the chats that it was trained on" in card


@pytest.mark.parametrize("template", ["chatml", "chatml_openai", "llama3"])
def test_the_answer_goes_on_where_the_prompt_ends(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    from llmpipe.data.chat.templates import Template

    served = Template(template, NAMED[template], {}).for_serving
    assert "generation %}" not in re.sub("add_generation_prompt", "", served)

    def text(turns: int, ask: bool = False) -> str:
        marks = {"bos_token": "<s>", "eos_token": "</s>"}
        return render_jinja_template([CHAT[:turns]], chat_template=served, add_generation_prompt=ask, **marks)[0][0]

    assert text(4).startswith(text(3, ask=True)) and text(3, ask=True).startswith(text(3))
    assert text(4).removeprefix(text(3, ask=True)).startswith("7")


@pytest.mark.parametrize("templates", [[None], ["tokenizer"], ["llama2", "mistral"]])
def test_no_template_of_one_name(run: Path, tmp_path: Path, templates: list[str | None]) -> None:
    trained_with(run, *templates)
    export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_template_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("its own")
    assert add_chat_template(tmp_path, {"data": [{"template": "llama2"}]}) is None
    assert (tmp_path / "chat_template.jinja").read_text() == "its own"

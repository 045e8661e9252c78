"""Chat templates: the tokenizer's own, in Jinja as transformers reads it, or one of the named ones below.

Named templates say with {% generation %} what the assistant writes, and end each of its turns with a stop token.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmpipe.data.chat.conversation import Conversation
from llmpipe.data.tokenizers import beside
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError, nearest

OWN = "tokenizer"
OWN_FILE = "chat_template.jinja"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(r"\{% (end)?generation %\}")

_ASSISTANT = "{% if message.role == 'assistant' %}"
_FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system, messages = messages[0].content, messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
)
_ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) or message.role == 'system' %}"
    "{{ raise_exception('turns of user and assistant have to alternate, beginning with the user') }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ ROLE }}\n"
    + _ASSISTANT
    + "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
NAMED = {
    # Megatron-LLM's tools/preprocess_instruct_data.py: the role words are question and answer.
    "chatml": _CHATML.replace("ROLE", "{'user': 'question', 'assistant': 'answer', 'system': 'system'}[message.role]"),
    # With the role words that ChatML itself has.
    "chatml_openai": _CHATML.replace("ROLE", "message.role"),
    # Meta's llama/generation.py (Llama 2): each exchange of two turns begins with BOS.
    "llama2": _FIRST_SYSTEM + "{% if system %}{% set system = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' %}{% endif %}"
    "{% for message in messages %}" + _ALTERNATE + _ASSISTANT
    + "{% generation %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content).strip() + ' [/INST]' }}"
    "{% endif %}{% endfor %}",
    # Meta's llama/tokenizer.py (Llama 3), class ChatFormat.
    "llama3": "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}" + _ASSISTANT
    + "{% generation %}{{ message.content.strip() + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message.content.strip() + '<|eot_id|>' }}{% endif %}{% endfor %}",
    # mistral-common's version 1, where [INST] is text.
    "mistral": "{{ bos_token }}" + _FIRST_SYSTEM + "{% if system %}{% set system = system + '\\n\\n' %}{% endif %}"
    "{% for message in messages %}" + _ALTERNATE + _ASSISTANT
    + "{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}{% endif %}{% endfor %}",
    # No marks at all: what the user says, what the assistant says, EOS. Alpaca's prompt brings its own.
    "plain": "{% for message in messages %}" + _ASSISTANT
    + "{% generation %}{{ message.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}",
}  # fmt: skip
# mistral-common from version 2 on, where [INST] is a control token, which needs no spaces around it.
_MISTRAL_CONTROL = (
    NAMED["mistral"]
    .replace("'[INST] '", "'[INST]'")
    .replace("' [/INST]'", "'[/INST]'")
    .replace("' ' + message.content", "message.content.rstrip(' ')")
)
ANSWER = {
    "chatml": "<|im_start|>answer\n",
    "chatml_openai": "<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
"""What makes the model answer, by named template; where the user's turn ends with it, nothing."""
NEEDED = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "chatml_openai": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
"""Control tokens that a named template writes, besides BOS and EOS."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written down as one text."""

    name: str
    text: str
    variables: dict[str, str]
    """What the template may name: bos_token, eos_token and the like."""
    with_tools: str | None = None
    """What takes the place of `text` where a conversation has tools."""
    is_own: bool = field(default=False)
    """Whether it is the tokenizer's: then transformers' way to put spaces before words holds, too."""

    @property
    def has_tools(self) -> bool:
        """Whether the template has a form for calls of tools and their answers."""
        return "tool" in self.text + (self.with_tools or "")

    def marks_generation(self, conversation: Conversation) -> bool:
        """Whether the template itself says what the assistant writes."""
        return bool(GENERATION.search(self._chosen(conversation)))

    @property
    def for_serving(self) -> str:
        """A named template as any chat program reads it: without marks, and asking for an answer when told to."""
        prompt = json.dumps(ANSWER.get(self.name, ""))
        asked = f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}" if self.name in ANSWER else ""
        return _MARKS.sub("", self.text) + asked

    def render(self, conversation: Conversation, ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where in it stands what the template marks as generated.

        `ask` ends it with the words that make the model answer, if the template has such. A template's refusal is a
        jinja2.TemplateError.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        chosen = self._chosen(conversation)
        rendered: Any = render_jinja_template(  # its annotation says str
            [conversation.messages],
            tools=conversation.tools,  # type: ignore[arg-type]
            chat_template=chosen,
            return_assistant_tokens_mask=bool(GENERATION.search(chosen)),
            add_generation_prompt=ask,
            **self.variables,  # type: ignore[arg-type]
        )
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _chosen(self, conversation: Conversation) -> str:
        return self.with_tools if conversation.tools and self.with_tools else self.text


def open_template(name: str | None, tokenizer: Tokenizer) -> Template:
    """The template of this name; None, or `tokenizer`, is the tokenizer's own. UserError if it cannot be had."""
    if name is None or name == OWN:
        return _own(tokenizer)
    if name not in NAMED:
        known = (OWN, *NAMED)
        raise UserError(f"template {name!r} is not known: {nearest(name, known)} ({OWN} is the tokenizer's own)")
    missing = [token for token in NEEDED.get(name, []) if token not in tokenizer.special]
    if missing:
        raise UserError(
            f"the template {name} writes the control tokens {', '.join(missing)}, which {tokenizer.path} does not have:"
            f" add them to the model (added_tokens: {NEEDED[name]} in its file), or take another template"
        )
    text = _MISTRAL_CONTROL if name == "mistral" and "[INST]" in tokenizer.special else NAMED[name]
    return Template(name, text, _named_marks(name, text, tokenizer))


def _named_marks(name: str, text: str, tokenizer: Tokenizer) -> dict[str, str]:
    """BOS and EOS by name; UserError if the template needs one that the tokenizer lacks."""
    found = _marks(tokenizer)
    if "eos_token" in text and not found["eos_token"]:
        raise UserError(
            f"the template {name} ends turns with EOS, and {tokenizer.path} has none: take another template"
        )
    return found


def _marks(tokenizer: Tokenizer) -> dict[str, str]:
    names = {number: token for token, number in tokenizer.special.items()}
    return {"bos_token": names.get(tokenizer.bos_id, ""), "eos_token": names.get(tokenizer.eos_id, "")}


def _own(tokenizer: Tokenizer) -> Template:
    folder = tokenizer.path.parent
    texts = own_texts(folder)
    text = texts.get("default") or next(iter(texts.values()), None)
    if text is None:
        raise UserError(
            f"{folder} has no chat template ({OFFERED}): name one of {', '.join(NAMED)} as the corpus's template"
        )
    return Template(OWN, text, _marks(tokenizer) | _variables(folder), texts.get("tool_use"), is_own=True)


OFFERED = f"{OWN_FILE}, or chat_template in {beside.CONFIG}"


def own_texts(folder: Path) -> dict[str, str]:
    """The chat templates beside a tokenizer by name: `default`, and perhaps `tool_use` and others."""
    if (folder / OWN_FILE).is_file():
        more = (folder / "additional_chat_templates").glob("*.jinja")
        return {"default": (folder / OWN_FILE).read_text(), **{path.stem: path.read_text() for path in sorted(more)}}
    told = beside.read(folder / beside.CONFIG).get("chat_template")
    if isinstance(told, list):
        return {entry["name"]: entry["template"] for entry in told}
    return {"default": told} if told else {}


def _variables(folder: Path) -> dict[str, str]:
    """The special tokens that transformers hands to a template."""
    found: dict[str, str] = {}
    for file in (beside.MAP, beside.CONFIG):
        for key, value in beside.read(folder / file).items():
            name: Any = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(name, str):
                found[key] = name
    return found

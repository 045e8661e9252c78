"""Tokenizers with chat templates in the manner of well-known models, made on the spot, and chats."""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from data_help import TEXT, train
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Llama 3's
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

QWEN_LIKE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {%- set shown = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- if loop.last %}{{- '\\n<think>\\n\\n</think>\\n' }}{%- endif %}
            {{- '\\n' + shown }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'user' or not (loop.first and tools) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3_LIKE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_LIKE = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
SPECIAL = {
    QWEN_LIKE: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    MARKED: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA3_LIKE: ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    LLAMA2_LIKE: ["<s>", "</s>"],
}
BOS = {LLAMA3_LIKE: "<|begin_of_text|>", LLAMA2_LIKE: "<s>"}
EOS = {LLAMA3_LIKE: "<|eot_id|>", LLAMA2_LIKE: "</s>"}


def byte_level(folder: Path, template: str | None = QWEN_LIKE, special: list[str] | None = None, **config: Any) -> Path:
    """A directory with a byte-level BPE as Qwen's and Llama 3's, and a chat template."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)  # type: ignore
    model.train_from_iterator([*TEXT, inspect.getsource(argparse)], trainer)
    model.add_special_tokens([AddedToken(name, special=True) for name in special or SPECIAL[template or QWEN_LIKE]])
    model.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    marks = {"bos_token": BOS.get(template or ""), "eos_token": EOS.get(template or "", "<|im_end|>")} | config
    made = PreTrainedTokenizerFast(tokenizer_object=model, **{key: name for key, name in marks.items() if name})
    if template:
        made.chat_template = template
    made.save_pretrained(folder)
    return folder


def sentencepiece(folder: Path, template: str | None = LLAMA2_LIKE, **config: Any) -> Path:
    """A directory with a SentencePiece model as Llama 2's, and a chat template."""
    train(folder / "tokenizer.model", 400)
    told = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | config
    if template:
        told["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def taking_space(folder: Path) -> Path:
    """As Phi 3's: control tokens take the white space after them with them."""
    template = (
        "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    byte_level(folder, template, names, eos_token="<|end|>")
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["rstrip"] = token["content"] in names
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def say(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "<|im_end|>", "parameters": {"type": "object", "properties": {}}},
    }
]
CALLING = [
    {"role": "user", "content": "What is 2 + 3?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "3"}}}],
    },
    {"role": "tool", "content": "5"},
    {"role": "tool", "content": "five"},
    {"role": "assistant", "content": "It is 5."},
]
CHATS = {
    "one exchange": say("What is 2 + 3?", "It is 5."),
    "a system": say("Count.", "1, 2, 3", system="Be brief."),
    "many turns": say("a", "b", "Beautiful is better", "than ugly.\n\nExplicit", "?", "!"),
    "spaces at the ends": say("  x \n", " \n y  ", "\tz", "w\n\n"),
    "no words": say("", "...", " ", "\u3000é"),
    "scripts": say("天地玄黃 🧑‍🚀👩‍👩‍👧 ▁▁", "Ω ≠ ω\u0301 \u202ertl 🏳️‍🌈", "def f(x):\n    return x", "\u200bnull\x00"),
    "an open end": say("a", "b", "c"),
    "the same answer": say("5", "5", "5", "5"),
}

"""Small tokenizers of the tokenizers library, of the families' kinds."""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# The patterns of the published tokenizer.json files of these families.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "falcon": [">>TITLE<<", "<|endoftext|>"],
    "llama2": ["<unk>", "<s>", "</s>"],
}
MARKS = {"llama3": (0, 1), "qwen2": (None, 0), "falcon": (None, 1), "llama2": (1, 2)}
"""Which of them are BOS and EOS."""


def byte_level(kind: str) -> Tokenizer:
    """A small byte-level BPE, which splits text as the family's."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "falcon":
        words: Any = [
            pre_tokenizers.Punctuation(behavior="contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]  # fmt: skip
    else:
        words = [pre_tokenizers.Split(Regex(LLAMA_3 if kind == "llama3" else QWEN_2), "isolated"), split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    train(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=first_of(kind))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL[kind]])
    if kind == "qwen2":
        tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    if kind == "llama3":
        bos = SPECIAL[kind][0]
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, special_tokens=[(bos, number)])
    return tokenizer


def first_of(kind: str) -> list[str]:
    """Falcon's special tokens are the first of its vocabulary; others' follow it."""
    return SPECIAL[kind] if kind == "falcon" else []


def llama_2() -> Tokenizer:
    """As the tokenizer.json of Llama 2: special tokens are pieces of the model too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [*SPECIAL["llama2"], *(f"<0x{byte:02X}>" for byte in range(256))]
    train(tokenizer, special_tokens=pieces)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(content))


def train(tokenizer: Tokenizer, **options: Any) -> None:
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **options)
    more = "<s> [INST] <|im_start|> it's WE'LL 12345 \u4e2d\u6587 <|eot_id|>"
    tokenizer.train_from_iterator([*inspect.getsource(argparse).splitlines(), *[more] * 3], trainer)


def save(kind: str, folder: Path) -> Tokenizer:
    """A directory as transformers saves it: tokenizer.json and tokenizer_config.json."""
    tokenizer = llama_2() if kind == "llama2" else byte_level(kind)
    bos, eos = (None if mark is None else SPECIAL[kind][mark] for mark in MARKS[kind])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(folder)
    return tokenizer

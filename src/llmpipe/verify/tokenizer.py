"""The tokenizer's side of the gate: the same file as the source's, and transformers reads it as SentencePiece does."""

import json
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

from llmpipe.files import sha256
from llmpipe.verify.card import Check, at_most

# No look-alikes of control tokens: transformers turns a written-out <s> into one, SentencePiece leaves it text (known).
PROBES = (
    "Hello world",
    " hello  two   spaces",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n",
    "Naïve façade, Ünïcödé, Привет, 你好世界, こんにちは",
    "1234567890 3.14159 0xdeadbeef",
    "émoji 🙂👩‍👩‍👧 and ﬁ ligature",
    "...!!??((([[{{<>}}]])))@#$%^&*_+-=|\\~`",
    "trailing space ",
)
FILES = ("tokenizer.model", "tokenizer.json")


def tokenizer_checks(subject: Path, reference: Path, rows: int) -> tuple[list[Check], str | None]:
    """The rows of the card on the tokenizer, and what differs first; `rows`: of the embedding."""
    checks = [_same_file(subject, reference)]
    if (subject / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(subject / "tokenizer.model"))
        size = pieces.get_piece_size()
        detail = f"{size:,} tokens, the embedding has {rows:,} rows"
        checks += [
            at_most("tokens without an embedding row", max(0, size - rows), 0, detail),
            _agreement(subject, pieces),
        ]
        if not (reference / "config.json").is_file():  # a Hugging Face source may name other ids, as chat models do
            checks.append(_special_ids(subject, pieces))
    return checks, next((f"tokenizer: {check.detail}" for check in checks if check.verdict == "fail"), None)


def _same_file(subject: Path, reference: Path) -> Check:
    """Meta's releases keep tokenizer.model beside the weights or one folder above."""
    here = [reference / name for name in FILES]
    above = [reference.parent / name for name in FILES if (subject / name).is_file()]
    sources = [path for path in here + above if path.is_file()]
    if not sources:
        return Check("tokenizer file", None, None, "not run", f"{reference} has none of {', '.join(FILES)}")
    name = sources[0].name
    if not (subject / name).is_file():
        return at_most("tokenizer file", 1, 0, f"{name} of the source is missing")
    same = sha256(subject / name) == sha256(sources[0])
    return at_most(
        "tokenizer file", int(not same), 0, f"{name} {'is' if same else 'is not'} the source's, byte for byte"
    )


def _special_ids(subject: Path, pieces: sentencepiece.SentencePieceProcessor) -> Check:
    """config.json's BOS and EOS are the tokenizer's: transformers starts and stops generation by config.json's."""
    config = json.loads((subject / "config.json").read_text())
    told = {name: config.get(f"{name}_token_id") for name in ("bos", "eos")}
    true = {"bos": pieces.bos_id(), "eos": pieces.eos_id()}
    wrong = [f"{name} is {told[name]}, the tokenizer's is {true[name]}" for name in true if told[name] != true[name]]
    return at_most(
        "special tokens that differ", len(wrong), 0, ", ".join(wrong) or f"bos {true['bos']}, eos {true['eos']}"
    )


def _agreement(subject: Path, pieces: sentencepiece.SentencePieceProcessor) -> Check:
    """How many probe texts transformers encodes unlike SentencePiece; the first is shown."""
    name, wrong = "texts tokenized differently", []
    try:
        theirs = AutoTokenizer.from_pretrained(subject, local_files_only=True)
    except (OSError, ValueError) as error:
        return at_most(name, None, 0, f"AutoTokenizer cannot read {subject}: {error}")
    for text in PROBES:
        ours, other = pieces.encode(text), theirs.encode(text, add_special_tokens=False)
        if ours != other:
            wrong.append(f"{text!r}: transformers {other[:12]}, SentencePiece {ours[:12]}")
    return at_most(
        name, len(wrong), 0, wrong[0] if wrong else f"AutoTokenizer and SentencePiece on {len(PROBES)} probe texts"
    )

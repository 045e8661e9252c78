"""The tokenizer's side of the gate: transformers reads the checkpoint's tokenizer as the source's own answers.

The source's own is SentencePiece, tiktoken's algorithm written out here (Llama 3's, Mistral's tekken), or its
tokenizer.json by the library.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.files import sha256
from llmpipe.verify.card import Check, at_most
from llmpipe.verify.own_tokenizer import Own, read_own

PROBES = (
    "Hello world",
    " hello  two   spaces",
    "def f(x):\n\treturn x ** 2  # comment\n\n\n",
    "Naïve façade, Ünïcödé, Привет, 你好世界, こんにちは",
    "1234567890 3.14159 0xdeadbeef 00 007 1,000,000 ١٢٣ ½",
    "émoji 🙂👩‍👩‍👧 and ﬁ ligature 🇨🇭 \U0001f1e6 \U0010ffff",
    "...!!??((([[{{<>}}]])))@#$%^&*_+-=|\\~`",
    "trailing space ",
    "\r\n\r\nline\rends\n \n\t\n",
    "   \t   ",
    "\x00\x01\x02\x1b[0m\x7f\x85 control\u200b\u200e\ufeff\u2028\u00a0",
    "a" * 400 + "é" * 100 + "Donaudampfschifffahrtsgesellschaft" * 8,
    "e\u0301 \u00e9 \u212b \u1e9b\u0323 \u0130i\u0131 \u01c5 \u4e2d\u6587\uff0c\uff21",
    "it's I'M we'LL they\u2019ve \u2581 \u2581\u2581x",
)
# Control tokens and what looks like them; those that the tokenizer has are left out below: transformers turns a
# written-out <s> into one, SentencePiece and llmpipe leave it text (known).
LOOK_ALIKES = (
    "<s", "</S>", "< s>", "<S>a</S>", "<unk", "<0x0A>", "<|im_start", "|im_end|>", "<|endoftext", "<|begin_of_text|",
    "[INST] x [/INST]", "<<SYS>>", "<s>", "</s>", "<|im_start|>user", "<|endoftext|>", "<|eot_id|>", "<pad>",
)  # fmt: skip

_FILES = ("tokenizer.model", "tekken.json", "tokenizer.json")


def tokenizer_checks(
    subject: Path, reference: Path, rows: int, resized_by: Path | None = None
) -> tuple[list[Check], str | None]:
    """The rows of the card on the tokenizer, and what differs first; `rows`: of the embedding.

    `resized_by`: the adapter that gave the embedding its rows; a tokenizer beside it is the source's, and has a token
    for each.
    """
    added = _added(subject)
    place = _within((resized_by,)) if resized_by else None
    place = place or _place(reference)
    checks = [_same_file(subject, reference, place, added)]
    try:
        own = read_own(place or subject)
    except UserError as error:
        own = None
        checks.append(at_most("texts tokenized differently", None, 0, str(error)))
    if own is not None:
        size = own.size + len(added)
        detail = f"{size:,} tokens, the embedding has {rows:,} rows"
        checks.append(at_most("tokens without an embedding row", max(0, size - rows), 0, detail))
        if resized_by and place:
            without = rows - size - _listed_beside(place, own.size)
            checks.append(at_most("rows of the adapter without a token", max(0, without), 0, detail))
        checks += _agreement(subject, own, added, rows)
        if not (reference / "config.json").is_file():  # a Hugging Face source may name other ids, as chat models do
            checks.append(_special_ids(subject, own))
    return checks, next((f"tokenizer: {check.detail}" for check in checks if check.verdict == "fail"), None)


def _added(subject: Path) -> list[str]:
    """The tokens that convert added, as the manifest has them."""
    if not manifest.has(subject):
        return []
    return manifest.read(subject).source.get("added_tokens", [])


def _listed_beside(place: Path, size: int) -> int:
    """How many tokens added_tokens.json adds to a tokenizer of that size."""
    file = place / "added_tokens.json"
    return sum(number >= size for number in json.loads(file.read_text()).values()) if file.is_file() else 0


def source_tokenizer(reference: Path) -> Own | None:
    """The source's own tokenizer; None if it has none."""
    place = _place(reference)
    return read_own(place) if place else None


def _place(reference: Path) -> Path | None:
    """Where the source's tokenizer lies: beside the weights, or one folder above for foreign formats."""
    folder = reference if reference.is_dir() else reference.parent
    above = [] if (folder / "config.json").is_file() else [folder.absolute().parent]
    return _within((folder, *above))


def _within(places: Iterable[Path]) -> Path | None:
    """The first that holds a tokenizer."""
    return next((place for place in places if any((place / name).is_file() for name in _FILES)), None)


def _same_file(subject: Path, reference: Path, place: Path | None, added: list[str]) -> Check:
    if place is None:
        return Check(
            "tokenizer file", None, None, "not run",
            f"the source has no tokenizer: {reference} holds no {', '.join(_FILES)}, so that nothing"
            " tells which ids its texts have",
        )  # fmt: skip
    name = next(name for name in _FILES if (place / name).is_file())
    if not (subject / name).is_file():
        return at_most("tokenizer file", 1, 0, f"{name} of the source is missing")
    if sha256(subject / name) == sha256(place / name):
        return at_most("tokenizer file", 0, 0, f"{name} is the source's, byte for byte")
    if name == "tokenizer.json" and added:
        same = _without(subject / name, added) == _without(place / name, added)
        told = "is the source's" if same else "is not the source's"
        return at_most("tokenizer file", int(not same), 0, f"{name} {told}, but for {len(added)} added tokens")
    return at_most("tokenizer file", 1, 0, f"{name} is not the source's, byte for byte")


def _without(path: Path, added: list[str]) -> dict[str, Any]:
    """A tokenizer.json without some of its added tokens."""
    content = json.loads(Tokenizer.from_file(str(path)).to_str())
    return content | {"added_tokens": [token for token in content["added_tokens"] if token["content"] not in added]}


def _special_ids(subject: Path, own: Own) -> Check:
    """config.json's BOS and EOS are the tokenizer's: transformers starts and stops generation by config.json's."""
    name, path = "special tokens that differ", subject / "config.json"
    if not path.is_file() or own.bos is None:
        return Check(name, None, None, "not run", f"{path.name} or the tokenizer does not say them")
    config = json.loads(path.read_text())
    told = {name: config.get(f"{name}_token_id") for name in ("bos", "eos")}
    true = {"bos": own.bos, "eos": own.eos}
    wrong = [f"{name} is {told[name]}, the tokenizer's is {true[name]}" for name in true if told[name] != true[name]]
    return at_most(name, len(wrong), 0, ", ".join(wrong) or f"bos {true['bos']}, eos {true['eos']}")


def _agreement(subject: Path, own: Own, added: list[str], rows: int) -> list[Check]:
    """How many probe texts transformers encodes unlike the source's own; the first is shown. Then the added tokens."""
    name = "texts tokenized differently"
    if not any((subject / file).is_file() for file in ("tokenizer.json", "config.json")):
        return [Check(name, None, None, "not run", f"{subject} is not of transformers' format")]
    try:
        theirs = AutoTokenizer.from_pretrained(subject, local_files_only=True)
    except (OSError, ValueError) as error:
        return [at_most(name, None, 0, f"AutoTokenizer cannot read {subject}: {error}")]
    texts = [*PROBES, *(text for text in LOOK_ALIKES if not any(t in text for t in theirs.get_added_vocab()))]
    wrong, excused = [], []
    for text in texts:
        ours, other = own.encode(text), theirs.encode(text, add_special_tokens=False)
        if ours != other:
            first = next((i for i, pair in enumerate(zip(ours, other, strict=False)) if pair[0] != pair[1]), 0)
            shown = text if len(text) < 80 else f"{text[:60]}..."
            theirs_shown, ours_shown = other[first : first + 12], ours[first : first + 12]
            (excused if own.excused(text) else wrong).append(
                f"{shown!r}: transformers {theirs_shown}, {own.name} {ours_shown}, from token {first}"
            )
    known = f"; {len(excused)} more differ, {own.inexact}: {excused[0]}" if excused else ""
    detail = (wrong[0] if wrong else f"AutoTokenizer and {own.name} on {len(texts)} adversarial texts") + known
    return [at_most(name, len(wrong), 0, detail)] + ([_added_ids(theirs, added, rows)] if added else [])


def _added_ids(theirs: Any, added: list[str], rows: int) -> Check:
    """Each added token is one id, no other's, and has a row."""
    ids = {token: theirs.encode(token, add_special_tokens=False) for token in added}
    wrong = [f"{token} is {found}" for token, found in ids.items() if len(found) != 1 or found[0] >= rows]
    wrong += [] if len({tuple(found) for found in ids.values()}) == len(ids) else [f"ids are shared: {ids}"]
    detail = "; ".join(wrong) or ", ".join(f"{token} {found[0]}" for token, found in [*ids.items()][:8])
    return at_most("added tokens that are not one id", len(wrong), 0, detail)

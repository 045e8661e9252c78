"""tekken.json against what mistral-common 1.13.1 said of the same file."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from adversarial import LOOK_ALIKES, planes, texts

from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError

# The pattern of Mistral's published files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGED = [
    "th",
    "the",
    " the",
    "  ",
    "    ",
    "\n\n",
    "\t\t",
    "TH",
    "THE",
    "'s",
    "<s>",
    "[IN",
    "ST]",
    "\u00e9",
    "12",
    "/\n",
    "re",
    "ab",
    "XY",
]
UNUSED = ["them", "not used"]  # published files have more tokens than their config counts
NUM_SPECIAL = 24


def write(path: Path, named: bool) -> None:
    """A small tekken.json; `named`: it names its special tokens, as files since version 11."""
    pieces = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in [*MERGED, *UNUSED])]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": piece.decode(errors="replace")}
        for rank, piece in enumerate(pieces)
    ]
    size = NUM_SPECIAL + len(pieces) - len(UNUSED)
    config = {"pattern": PATTERN, "num_vocab_tokens": len(pieces), "default_vocab_size": size}
    config |= {"default_num_special_tokens": NUM_SPECIAL, "version": "v11" if named else "v3"}
    content: dict[str, Any] = {"config": config, "vocab": vocab}
    if named:
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[THINK]"]
        content["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    path.write_text(json.dumps(content))


# mistral-common's: of all texts of adversarial.py, as JSON, and of some in full with BOS and EOS.
IDS_SHA256 = "4bc70c870d0352ab2c0a98464cccf3f0f831b27485ab04b0e7b1b2d4f9c606d3"
IDS = {
    "the theme's THE <s>[INST] 123/\n\n x": [
        1, 281, 282, 133, 125, 289, 56, 288, 56, 84, 139, 86, 115, 97, 102, 107, 108, 117, 56, 73, 74, 75, 71, 285, 56,
        144, 2,
    ],
    "\u2581 the\u00e9": [1, 250, 174, 153, 282, 293, 2],
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
def test_ids_are_mistral_commons(tmp_path: Path, named: bool) -> None:
    write(tmp_path / "tekken.json", named)
    ours, every = open_tokenizer(tmp_path), texts()
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("mistral-common", 299, 1, 2)
    found = {text: [ours.bos_id, *ours.encode(text), ours.eos_id] for text in IDS}
    assert found == IDS
    ids = [ours.encode(text) for text in every]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS_SHA256
    assert ours.encode_batch([text.encode() for text in every], 2) == ids
    assert [ours.decode(number) for number in ids] == every
    assert all(ours.decode(ours.encode(text)) == text for text in planes())


def test_special_tokens_have_ids_and_no_text_gives_them(tmp_path: Path) -> None:
    write(tmp_path / "tekken_240911.json", named=False)
    ours = open_tokenizer(tmp_path / "tekken_240911.json")
    found = {
        name: ours.token_id(name) for name in ("<s>", "[INST]", "[/INST]", "<pad>", "[TOOL_CONTENT]", "<SPECIAL_20>")
    }
    assert found == {"<s>": 1, "[INST]": 3, "[/INST]": 4, "<pad>": 11, "[TOOL_CONTENT]": 19, "<SPECIAL_20>": 20}
    assert len(ours.special) == NUM_SPECIAL
    for text in LOOK_ALIKES:
        assert min(ours.encode(text)) >= NUM_SPECIAL
    assert ours.decode([3, *ours.encode("the"), 4, 2]) == "the"


def test_names_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "tekken.json", named=True)
    ours = open_tokenizer(tmp_path)
    assert (ours.token_id("[THINK]"), ours.token_id("<SPECIAL_6>")) == (5, 6)
    with pytest.raises(UserError, match=r"tekken\.json has no token '\[THINKS\]': did you mean '\[THINK\]'\?"):
        ours.token_id("[THINKS]")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    def said(change: dict[str, Any]) -> str:
        write(path, named=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError) as error:
            open_tokenizer(path)
        return str(error.value)

    path = tmp_path / "tekken.json"
    write(path, named=True)
    content = json.loads(path.read_text())
    no = f"{path} is no tekken.json of Mistral"
    again = "copy or download it again"
    assert said({"config": {}}) == f"{no} (KeyError: 'default_num_special_tokens'): {again}"
    assert said({"special_tokens": None}) == f"{no} (ValueError: special_tokens are missing): {again}"
    assert said({"vocab": content["vocab"][:270]}) == f"{path} lacks tokens: it has 270, its config says 275: {again}"
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_tokenizer(path)

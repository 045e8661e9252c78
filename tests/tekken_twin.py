"""A small tekken.json, and what mistral-common 1.13.1 said of it."""

import base64
import json
from pathlib import Path
from typing import Any

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
    "<s",
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


def write_tekken(path: Path, named: bool, more: tuple[str, ...] = ()) -> None:
    """`named`: it names its special tokens, as files since version 11; `more`: tokens beyond those here."""
    pieces = [*(bytes([byte]) for byte in range(256)), *(piece.encode() for piece in [*MERGED, *more, *UNUSED])]
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
IDS_SHA256 = "4a3169257953024924540e24c5bd60e2d34c9089bfc9a73e65f14a88c7d94145"
IDS = {
    "the theme's THE <s>[INST] 123/\n\n x": [
        1, 281, 282, 133, 125, 289, 56, 288, 56, 84, 139, 86, 115, 97, 102, 107, 108, 117, 56, 73, 74, 75, 71, 285, 56,
        144, 2,
    ],
    "\u2581 the\u00e9": [1, 250, 174, 153, 282, 293, 2],
}  # fmt: skip

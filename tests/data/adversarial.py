"""Texts that tokenizers trip over, the same each time."""

import random

LOOK_ALIKES = (
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "[INST] x [/INST]", "<<SYS>>", "[TOOL_CALLS]", "<|begin_of_text|>",
    "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n", "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|>", "a<s>b", " <s> ", "<s><s>", "<|im_start", "<SPECIAL_25>", "<|reserved_special_token_3|>",
)  # fmt: skip
_CONTRACTIONS = [f"'{end}" for end in (*"sStTmMdD", "\u017f", "re", "RE", "Re", "ve", "ll", "LL", "lL")]
_PLAIN = (
    "", " ", "\n", "a", "Hello world", " hello  two   spaces ", "tabs\tand\r\nlines\r\n\r\n    indented\n\n\n\n",
    *(f"it{c} we{c}x {c} I{c}\n{c}" for c in _CONTRACTIONS),
    "1 12 123 1234 12345678 3.14159 1,000,000 0x7fff \u0661\u0662\u0663 \u00bd\u2460\u2167",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e8\U0001f1ed \U0001f44d\U0001f3fd\ufe0f" * 3,
    "\u2581 \u2581\u2581a \u2581b", "e\u0301 \u00e9 \u212b \ufb01 \uff21 \u1e9e \u0130 \u01c5",
    "\u4e2d\u6587\uff0c\u65e5\u672c\u8a9e\ud55c\uad6d\uc5b4", "a\x00b\x1c\x1f\x7f\x85\u200b\u2028\ufeff\ufffd",
    "!!??((([[{<>}]]))) //\n/* */ -- ==\n\n", "x" * 300 + "\u00e9" * 99,
    *(" " * n + "x" + "\n" * n + "\t" * n for n in (2, 3, 7, 16, 17, 64, 200)),
)  # fmt: skip
_ALPHABETS = (
    "abcdeXYZ", "  \n\r\t", "0123456789", "'sSlLtTdD", "\u2581\u3000\u00a0\u200d\ufe0f", "\u00e9\u00f1\u4e2d\u05d0",
    "<>|/[]._-!", "\x00\x1c\x85\u2028\u0301\u0327", "\U0001f600\U0001f469\U0001f1e8\U0010fffd",
)  # fmt: skip


def texts(count: int = 400) -> list[str]:
    """Random mixtures, random bytes decoded with replacement, and names of special tokens."""
    draw = random.Random(1)
    mixed = ["".join(draw.choice(draw.choice(_ALPHABETS)) for _ in range(draw.randrange(1, 60))) for _ in range(count)]
    noise = [draw.randbytes(80).decode(errors="replace") for _ in range(count // 4)]
    return [*_PLAIN, *LOOK_ALIKES, *mixed, *noise]


def planes() -> list[str]:
    """Every code point of the first three planes, and the last ones, a few hundred a text."""
    found = [*range(0xD800), *range(0xE000, 0x30000), *range(0x10FC00, 0x110000)]
    return ["".join(map(chr, found[first : first + 512])) for first in range(0, len(found), 512)]

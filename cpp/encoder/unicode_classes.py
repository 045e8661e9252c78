"""Writes unicode_classes.h: the class of every code point, as runs, from Python's unicodedata.

python cpp/encoder/unicode_classes.py > cpp/encoder/unicode_classes.h
"""

import itertools
import unicodedata

CLASSES = {"Lu": "U", "Lt": "U", "Ll": "L", "Lm": "X", "Lo": "X", "Cn": "Q"}
FIRST_LETTERS = {"M": "M", "N": "N", "Z": "W"}
WHITE = "\t\v\f\x85"
"""White space to a regular expression, though Unicode puts these under control characters."""


def class_of(character: str) -> str:
    """U: upper or title case, L: lower case, X: other letters, M: marks, N: numbers, W: white, R: CR and LF,
    Q: not assigned in this version of Unicode, O: all else."""
    if character in "\r\n":
        return "R"
    if character in WHITE:
        return "W"
    category = unicodedata.category(character)
    return CLASSES.get(category) or FIRST_LETTERS.get(category[0], "O")


def runs() -> str:
    """A letter for each run of code points of one class, then its length unless that is 1."""
    classes = (class_of(chr(point)) for point in range(0x110000))
    found = ((name, len(list(group))) for name, group in itertools.groupby(classes))
    return "".join(f"{name}{length if length > 1 else ''}" for name, length in found)


def header() -> str:
    """The header's text."""
    text = runs()
    lines = "\n".join(f'    "{text[start : start + 112]}"' for start in range(0, len(text), 112))
    return f"""// Made by unicode_classes.py, which says what the letters are: do not edit.
#pragma once

// Unicode {unicodedata.unidata_version}
constexpr char kUnicodeClasses[] =
{lines};
"""


if __name__ == "__main__":
    print(header(), end="")

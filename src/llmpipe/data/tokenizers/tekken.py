"""Mistral's tekken.json, read as mistral-common does (github.com/mistralai/mistral-common tokens/tokenizers/tekken.py).

- `config`: `pattern` splits a text into words; `default_vocab_size` tokens are used, of which the first
  `default_num_special_tokens` are special.
- `vocab`: objects with `rank` and base64 `token_bytes`, in order; more than are used.
- `special_tokens`: objects with `rank` and `token_str`; files until version 7 may lack them, and names are as here.
"""

import base64
from pathlib import Path
from typing import Any

from llmpipe.data.tokenizers.tiktoken import TikToken
from llmpipe.errors import UserError
from llmpipe.files import read_json

_REMEDY = "copy or download it again"
_NAMES = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def open_tekken(path: Path) -> TikToken:
    """The tokenizer of a tekken.json; UserError if the file is none."""
    content = read_json(path, _REMEDY)
    try:
        config = content["config"]
        num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
        pieces = {base64.b64decode(token["token_bytes"]): token["rank"] for token in content["vocab"]}
        pieces = {token: rank for token, rank in pieces.items() if rank < size - num_special}
        special, pattern = _special(content, num_special), config["pattern"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no tekken.json of Mistral ({type(error).__name__}: {error}): {_REMEDY}") from error
    if sorted(pieces.values()) != list(range(size - num_special)):
        raise UserError(f"{path} lacks tokens: it has {len(pieces)}, its config says {size - num_special}: {_REMEDY}")
    return TikToken(path, "mistral-common", pattern, pieces, special, "<s>", "</s>", num_special)


def _special(content: dict[str, Any], count: int) -> dict[str, int]:
    """Every special token's id by name; those without one are numbered."""
    given = content.get("special_tokens")
    if given is None and int(content["config"]["version"].lstrip("v").partition("m")[0]) > 7:
        raise ValueError("special_tokens are missing")
    names = {token["rank"]: token["token_str"] for token in given} if given is not None else dict(enumerate(_NAMES))
    return {names.get(number, f"<SPECIAL_{number}>"): number for number in range(count)}

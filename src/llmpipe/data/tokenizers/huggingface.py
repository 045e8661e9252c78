"""tokenizer.json: the `tokenizers` library's answer is the truth, but for special tokens, which no text gives."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from llmpipe.data.tokenizers import beside
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.errors import UserError

_NOWHERE = "\ufdd0\ufdd1"  # noncharacters: no text has them


class HuggingFace(Tokenizer):
    """A special token's name in a text is encoded as the text that it is; other added tokens are the library's."""

    kind = "tokenizers"

    def __init__(self, path: Path):
        self.model = load(path)
        self._name_special(path.parent)
        decoder = self.model.get_added_tokens_decoder()
        special = {token.content: number for number, token in decoder.items() if token.special}
        bos, eos = (special.get(beside.mark(path.parent, role) or "", -1) for role in ("bos", "eos"))
        self._encoder = _without(self.model, special)
        super().__init__(path, 1 + max(self.model.get_vocab().values(), default=-1), special, bos, eos)

    def _name_special(self, folder: Path) -> None:
        """What the files beside call special is special; tokenizer.json may not say it."""
        said = {token.content for token in self.model.get_added_tokens_decoder().values() if token.special}
        names = sorted(beside.special_names(folder) - said)
        known = [name for name in names if self.model.token_to_id(name) is not None]
        self.model.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in known])

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[bytes], threads: int) -> list[list[int]]:
        os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the library's pool, which the first call makes
        found = self._encoder.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)

    def _piece_id(self, name: str) -> int | None:
        return self.model.token_to_id(name)


def load(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json without the limits on length that some were saved with; UserError if the file is none."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{path} is not a tokenizer of the tokenizers library ({error}): copy or download it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def put_around(processor: dict[str, Any]) -> list[int]:
    """The ids that a tokenizer.json's `post_processor` puts around a text."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "decoder")
    model = {"type": "BPE", "vocab": {}, "merges": []}
    content = {"added_tokens": [], "post_processor": processor, "model": model} | dict.fromkeys(names)
    return tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **content})).encode("").ids


def _without(tokenizer: tokenizers.Tokenizer, special: dict[str, int]) -> tokenizers.Tokenizer:
    """The same tokenizer, where no text is a special token.

    Asked to, the library leaves the names of special tokens in a text to its model. Where the model has them as pieces
    too, they are renamed there.
    """
    if any(tokenizer.model.token_to_id(name) is not None for name in special):
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_renamed(json.loads(tokenizer.to_str()), special)))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _renamed(content: dict[str, Any], special: dict[str, int]) -> dict[str, Any]:
    """A tokenizer.json whose special tokens have names that no text has."""
    model = content["model"]

    def name(token: str) -> str:
        return _NOWHERE + token if token in special else token

    for token in content["added_tokens"]:
        token["content"] = name(token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name(token): number for token, number in model["vocab"].items()}
    else:  # unigram
        model["vocab"] = [[name(token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        model["merges"] = [pair for pair in model["merges"] if not special.keys() & {*pair, "".join(pair)}]
    if model.get("unk_token"):
        model["unk_token"] = name(model["unk_token"])
    return content | {"post_processor": None}

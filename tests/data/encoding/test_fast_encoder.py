"""The gate before the compiled encoder: what passes it, what goes to the library, and what stops a run."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from byte_level import byte_level
from data_help import train
from tokenizers import Tokenizer

from llmpipe.data.encoding.fast_encoder import PROBES, FastEncoder, fast_encoder
from llmpipe.data.encoding.texts import Texts
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers.compiled import compiled, packed
from llmpipe.errors import UserError
from tiktoken_twin import write_tiktoken

NONE = np.zeros(0, np.int32)


def encode(fast: FastEncoder, texts: list[bytes], before: list[int], after: list[int]) -> list[list[int]]:
    """The ids of each text."""
    ids, sizes = fast.encode(Texts.of(texts), before, after)
    assert sizes.sum() == len(ids)
    ends = np.cumsum(sizes)
    return [ids[end - size : end].tolist() for end, size in zip(ends, sizes, strict=True)]


def test_texts_with_added_tokens_are_left_to_the_library(tmp_path: Path) -> None:
    """As Qwen's <tool_call>, which is added and not special: its library finds it in a text."""
    path = byte_level(tmp_path, None)
    library = Tokenizer.from_file(str(path))
    library.add_tokens(["<tool_call>"])
    library.save(str(path))
    fast = fast_encoder(open_tokenizer(path))
    assert fast
    texts = ["is it <tool_call>", "is it <tool_cal"]
    ids = encode(fast, [text.encode() for text in texts], [], [])
    assert ids == [library.encode(text).ids for text in texts]
    assert (library.token_to_id("<tool_call>") in ids[0], len(ids[0]) < len(ids[1])) == (True, True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: train(folder / "tokenizer.model", 400, "nmt_nfkc"), "its model normalizes texts"),
        (lambda folder: byte_level(folder, r"\p{L}+|\P{L}"), r"its pattern is another: \p{L}+|\P{L}"),
    ],
)
def test_other_tokenizers_are_left_to_their_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = open_tokenizer(make(tmp_path))
    assert fast_encoder(tokenizer) is None
    said = f"texts are encoded by {tokenizer.kind}, not by llmpipe's faster encoder: {reason}"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_marks_go_around_texts_that_have_ids(tokenizer_dir: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_dir)
    fast = fast_encoder(tokenizer)
    assert fast
    found = encode(fast, [b"is it", b"", b" "], [1], [2, 2])
    assert found == [[1, *tokenizer.encode("is it"), 2, 2], [], [1, *tokenizer.encode(" "), 2, 2]]
    assert encode(fast, [], [1], [2, 2]) == []


def test_characters_of_a_newer_unicode_are_left_to_the_library(tmp_path: Path) -> None:
    """U+1FAE9 came with Unicode 16: to one library a symbol, to another nothing yet."""
    write_tiktoken(tmp_path / "tokenizer.model", 500)
    tokenizer = open_tokenizer(tmp_path)
    own, new = compiled(tokenizer), "a \U0001fae9 b"
    ids, sizes = own.encoder.encode(*packed([b"a", new.encode(), b"b"]), NONE, NONE)
    assert (ids.tolist(), sizes.tolist()) == (tokenizer.encode("a") + tokenizer.encode("b"), [1, -1, 1])
    fast, expected = FastEncoder(tokenizer, own), [[7, *tokenizer.encode(text), 8] for text in ("a", new, "b")]
    assert encode(fast, [b"a", new.encode(), b"b"], [7], [8]) == expected


def wrong(folder: Path, other: Path) -> FastEncoder:
    """The encoder of another model in the place of a tokenizer's own."""
    return FastEncoder(open_tokenizer(folder), compiled(open_tokenizer(other)))


def test_wrong_ids_stop_before_the_first_text(tokenizer_dir: Path, other_tokenizer_dir: Path) -> None:
    with pytest.raises(UserError, match=r"llmpipe's own encoder is wrong: from token \d+ on it has \[") as error:
        wrong(tokenizer_dir, other_tokenizer_dir).prove(PROBES)
    assert "where sentencepiece has [" in str(error.value) and "say --encoder reference" in str(error.value)


def test_wrong_ids_stop_a_run_and_show_the_document(tokenizer_dir: Path, other_tokenizer_dir: Path) -> None:
    fast, document = wrong(tokenizer_dir, other_tokenizer_dir), "Beautiful is better than ugly. "
    with pytest.raises(UserError, match=re.escape(repr(document))):
        encode(fast, [document.encode()], [1], [2])


def test_a_thousandth_of_a_corpus_is_checked(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(tokenizer_dir)
    fast, checked = FastEncoder(tokenizer, compiled(tokenizer)), []
    monkeypatch.setattr(fast, "_check", lambda text, ids: checked.append(text))
    batch = [b"%04d " % number * 20 for number in range(700)]
    for _ in range(10):
        encode(fast, batch, [], [])
    assert checked[0] == batch[0] and len(checked) == len(set(checked)) == 7

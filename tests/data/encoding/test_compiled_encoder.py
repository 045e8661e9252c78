"""The compiled encoder against sentencepiece, tiktoken and tokenizers, on texts that encoders trip over."""

import random
import struct
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from adversarial import planes, texts
from byte_level import byte_level
from data_help import TEXT, train

from llmpipe import helpers
from llmpipe.data.encoding.fast_encoder import FastEncoder, fast_encoder
from llmpipe.data.encoding.texts import Texts
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers.compiled import SPLITS, compiled, packed
from tekken_twin import write_tekken
from tiktoken_twin import write_tiktoken

ROOT = Path(__file__).parents[3]
NONE = np.zeros(0, np.int32)
# Units longer than a table's longest, than the scan's and the window's, in which merges run over the ends of windows.
LONG = [
    *("a" * n for n in (15, 16, 31, 32, 63, 64, 65, 127, 128, 4095, 4096, 4097, 30_000)),
    *(" " * n + "x" for n in (15, 64, 300, 9_000)),
    "is better than " * 40 + "isbetterthan" * 900,
    "\u4e2d\u6587" * 3_000,
    "\n" * 5_000,
    "".join(random.Random(0).choices("abcde \n", k=40_000)),
    "".join(random.Random(1).choices("thebtr", k=40_000)),
]


def fuzz(count: int, seed: int) -> list[str]:
    """Short random texts: of a few characters that go together, of any, and of bytes that are no UTF-8."""
    draw = random.Random(seed)
    pools = [
        "abcdefg hij",
        "'sStTrReEvVlLmMdD\u017f ",
        "  \n\r\t\u00a0\u2028\u3000a",
        "019\u0663\u00bd ,.-/",
        "\u2581 \u2581a\u0301\u0300",
    ]
    pools += [
        "aB\u01c5\u02b0\u4e2d\u0301 '",
        "\U0001f469\u200d\ufe0f\U0001f3fd x",
        "<|s>/[INST]\n",
        *filter(None, TEXT),
    ]
    mixed = ["".join(draw.choices(draw.choice(pools), k=draw.randrange(1, 40))) for _ in range(count)]
    anywhere = ["".join(chr(draw.randrange(0xD800)) for _ in range(draw.randrange(1, 12))) for _ in range(count // 4)]
    return (
        mixed + anywhere + [draw.randbytes(draw.randrange(1, 40)).decode(errors="replace") for _ in range(count // 4)]
    )


def check(path: Path, more: list[str] = LONG) -> FastEncoder:
    """The ids of every text are the library's, in one batch and alone; few texts are left to the library."""
    tokenizer = open_tokenizer(path)
    own, every = compiled(tokenizer), [*texts(), *more, *fuzz(2_000, 2)]
    encoded = [text.encode() for text in every]
    truth = tokenizer.encode_batch(encoded, 1)
    ids, sizes = own.encoder.encode(*packed(encoded), NONE, NONE)
    start, sure = 0, 0
    for text, size, expected in zip(every, sizes.tolist(), truth, strict=True):
        if size >= 0 and (not own.composed or unicodedata.is_normalized("NFC", text)):
            assert ids[start : start + size].tolist() == expected, text[:300]
            sure += 1
        start += max(size, 0)
    assert start == len(ids) and sure > 0.9 * len(every)
    fast = fast_encoder(tokenizer)
    assert fast
    encoded = [text.encode() for text in planes()]
    found, _ = fast.encode(Texts.of(encoded), [], [])
    assert found.tolist() == [number for ids in tokenizer.encode_batch(encoded, 1) for number in ids]
    return fast


OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True},
    {"byte_fallback": False},
    {"split_by_whitespace": False, "max_sentencepiece_length": 40},
    {"allow_whitespace_only_pieces": True, "split_digits": True},
    {"user_defined_symbols": ["[REF]", "[REF", "is\u2581b", "ette", "\u00e9", "\u2581\u2581"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "as Llama's")
def test_ids_are_sentencepieces(tmp_path: Path, options: dict[str, Any]) -> None:
    check(train(tmp_path / "tokenizer.model", 420, **options))


def grown(model: Path, pieces: list[str]) -> Path:
    """A model with more pieces behind its own, all with the score 0, as Chinese-LLaMA's."""
    with model.open("ab") as file:  # a repeated field of a protobuf message goes on where the file ends
        for piece in pieces:
            text = piece.encode()
            entry = bytes([0x0A, len(text)]) + text + b"\x15" + struct.pack("<f", 0.0)
            file.write(bytes([0x0A, len(entry)]) + entry)
    return model


def test_a_grown_vocabulary_is_sentencepieces(tmp_path: Path) -> None:
    """Pieces of one score go first from the left."""
    pieces = [
        "\u4e2d",
        "\u4e2d\u6587",
        "\u6587\u4e2d",
        "hel",
        "ell",
        "lo",
        "llo",
        "bet",
        "ett",
        "tter",
        "\u2581\u2581a",
    ]
    model = grown(train(tmp_path / "tokenizer.model", 420), pieces)
    more = ["hello hellollo better tterett", "\u4e2d\u6587\u4e2d\u6587\u6587\u4e2d\u4e2d", *fuzz(1_000, 5)]
    check(model, [*more, "\u4e2d\u6587" * 9_000 + "betterello" * 2_000, *LONG])


def test_the_first_merge_and_a_grown_piece_go_in_the_librarys_order(tmp_path: Path) -> None:
    """The first merge that was learnt has the score -0.0, a grown piece 0.0: not all libraries take them for equal."""
    model = train(tmp_path / "tokenizer.model", 420)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    scores = {
        library.id_to_piece(i): library.get_score(i) for i in range(library.vocab_size()) if library.is_byte(i) is False
    }
    first = next(piece for piece, score in scores.items() if score == 0 and len(piece) == 2)
    grown(model, ["\u4e2d", f"{first[1]}\u4e2d"])
    library.load(str(model))
    text = f"x{first}\u4e2d"
    ids, _ = compiled(open_tokenizer(model)).encoder.encode(*packed([text.encode()]), NONE, NONE)
    assert ids.tolist() == library.encode(text)


def test_ids_are_tiktokens(tmp_path: Path) -> None:
    write_tiktoken(tmp_path / "tokenizer.model", 500)
    check(tmp_path)


def test_ids_are_tekkens(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", named=False)
    check(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen2", "tekken"])
def test_ids_are_the_tokenizers_librarys(tmp_path: Path, name: str, whole: bool) -> None:
    pattern = next(pattern for pattern, known in SPLITS.items() if known == name)
    fast = check(byte_level(tmp_path, None if name == "gpt2" else pattern, name == "qwen2", whole))
    ids, _ = fast.encode(Texts.of([b"ambiguity"]), [], [])
    assert (ids.tolist() == [450]) is whole


def test_threads_at_once_get_the_same(tmp_path: Path) -> None:
    encoder = compiled(open_tokenizer(train(tmp_path / "tokenizer.model", 400))).encoder
    batches = [packed([text.encode() for text in group]) for group in (texts(), LONG, fuzz(500, 1), texts()[::-1])] * 8
    marks = np.array([1], np.int32), np.array([2], np.int32)
    alone = [encoder.encode(*batch, *marks) for batch in batches]
    with ThreadPoolExecutor(5) as pool:
        together = pool.map(lambda batch: encoder.encode(*batch, *marks), batches)
        for found, expected in zip(together, alone, strict=True):
            assert all(map(np.array_equal, found, expected)) and found[0].dtype == expected[0].dtype


def test_bad_input_is_refused(tmp_path: Path) -> None:
    encoder, data = compiled(open_tokenizer(train(tmp_path / "tokenizer.model", 400))).encoder, np.zeros(3, np.uint8)
    for offsets, said in (
        ([], "start with 0"),
        ([1, 2], "start with 0"),
        ([0, 2, 1], "have to grow"),
        ([0, 4], "go beyond"),
    ):
        with pytest.raises(ValueError, match=said):
            encoder.encode(data, np.array(offsets, np.int64), NONE, NONE)
    tokens = packed([bytes([byte]) for byte in range(255)])
    with pytest.raises(ValueError, match="byte 255 is no token"):
        helpers.byte_encoder(*tokens, NONE, True, "gpt2")
    tokens = packed([bytes([byte]) for byte in range(256)])
    with pytest.raises(ValueError, match="no split pattern is called gpt5"):
        helpers.byte_encoder(*tokens, NONE, True, "gpt5")
    with pytest.raises(ValueError, match="two pieces have the text a"):
        helpers.piece_encoder(*packed([b"a", b"a"]), np.zeros(2, np.float32), True, False, 0, NONE, NONE)


@pytest.mark.skipif(unicodedata.unidata_version != "14.0.0", reason="the header was made by a Python with Unicode 14")
def test_the_classes_of_characters_are_unicodes() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "cpp/encoder/unicode_classes.py")], capture_output=True, text=True, check=True
    )
    assert made.stdout == (ROOT / "cpp/encoder/unicode_classes.h").read_text()

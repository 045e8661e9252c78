"""Llama 3's tokenizer.model against tiktoken, set up as Meta's own code does."""

import json
from pathlib import Path

import pytest
import tiktoken as library
from adversarial import LOOK_ALIKES, planes, texts

from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers import tiktoken
from tiktoken_twin import SPLIT, encode, write_tiktoken

RANKS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama3")
    write_tiktoken(made / "tokenizer.model", RANKS)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[bytes, int]:
    return write_tiktoken(folder / "again", RANKS)


def test_ids_are_tiktokens(folder: Path, ranks: dict[bytes, int]) -> None:
    truth = library.Encoding("l3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={"<|begin_of_text|>": RANKS})
    ours, every = open_tokenizer(folder), [*texts(), *planes()]
    assert (ours.kind, ours.path, ours.vocab_size) == ("tiktoken", folder / "tokenizer.model", RANKS + 256)
    for text in every:
        ids = ours.encode(text)
        assert ids == truth.encode(text, disallowed_special=()), text
        assert ours.decode(ids) == text
    assert ours.encode_batch([text.encode() for text in every], 2) == [ours.encode(text) for text in every]


def test_ids_are_those_of_the_algorithm_written_plainly(folder: Path, ranks: dict[bytes, int]) -> None:
    ours = open_tokenizer(folder)
    for text in texts(100):
        assert ours.encode(text) == encode(ranks, text), text


def test_special_tokens_have_ids_and_no_text_gives_them(folder: Path) -> None:
    ours = open_tokenizer(folder)
    assert (ours.bos_id, ours.eos_id, ours.add_bos) == (RANKS, RANKS + 1, False)
    for text in LOOK_ALIKES:
        assert max(ours.encode(text)) < RANKS
    assert ours.decode([ours.bos_id, *ours.encode("a b"), ours.token_id("<|eot_id|>"), ours.eos_id]) == "a b"


# Where Meta's releases put the names, after 128,000 ranks (llama3 and llama-models, tokenizer.py).
NAMES_3 = {
    "<|start_header_id|>": 6,
    "<|eot_id|>": 9,
    "<|reserved_special_token_4|>": 8,
    "<|reserved_special_token_250|>": 255,
}
NAMES_3_1 = {
    "<|finetune_right_pad_id|>": 4, "<|start_header_id|>": 6, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
    "<|reserved_special_token_2|>": 5, "<|reserved_special_token_247|>": 255,
}  # fmt: skip


@pytest.mark.parametrize(
    ("params", "names"), [(None, NAMES_3_1), ({"use_scaled_rope": True}, NAMES_3_1), ({"rope_theta": 5e5}, NAMES_3)]
)
def test_names_of_special_tokens_by_release(
    folder: Path, tmp_path: Path, params: dict | None, names: dict[str, int]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    if params is not None:
        (tmp_path / "params.json").write_text(json.dumps(params))
    ours = open_tokenizer(tmp_path)
    assert len(ours.special) == 256
    assert {name: ours.token_id(name) - RANKS for name in names} == names


def test_what_lies_beside_names_special_tokens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|mine|>": RANKS + 5, "<|im_start|>": RANKS + 256}))
    ours = open_tokenizer(tmp_path)
    assert (ours.token_id("<|mine|>"), ours.token_id("<|im_start|>")) == (RANKS + 5, RANKS + 256)
    assert (ours.vocab_size, len(ours.special)) == (RANKS + 257, 257)
    assert ours.decode(ours.encode("<|im_start|>")) == "<|im_start|>" and ours.decode([RANKS + 256]) == ""


def test_very_long_white_space_is_split_as_tiktoken_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million characters of it overflow tiktoken's stack; here from the second on."""
    ours, every = open_tokenizer(folder), texts()
    truth = [ours.encode(text) for text in every]
    monkeypatch.setattr(tiktoken, "LONGEST_BLANK", 2)
    assert [ours.encode(text) for text in every] == truth


def test_a_million_spaces(folder: Path) -> None:
    ours = open_tokenizer(folder)
    text = "a." + "\n" * 400_000 + " " * 700_000 + "b"
    assert ours.decode(ours.encode(text)) == text

"""tokenizer.json against the tokenizers library and transformers."""

import json
from pathlib import Path

import pytest
from adversarial import LOOK_ALIKES, planes, texts
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from json_tokenizers import SPECIAL, save
from llmpipe.data.tokenizer import open_tokenizer

KINDS = sorted(SPECIAL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each family, as transformers saves it."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        save(kind, folder)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys(folders: dict[str, Path], kind: str) -> None:
    library = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    theirs, ours = AutoTokenizer.from_pretrained(folders[kind]), open_tokenizer(folders[kind])
    clean = [text for text in texts() if not any(name in text for name in SPECIAL[kind])]
    every = [*clean, *planes()]
    truth = [encoding.ids for encoding in library.encode_batch_fast(every, add_special_tokens=False)]
    assert ours.encode_batch([text.encode() for text in every], 2) == truth
    assert [ours.encode(text) for text in clean] == truth[: len(clean)]
    assert theirs(clean, add_special_tokens=False)["input_ids"] == truth[: len(clean)]
    assert [ours.decode(ids) for ids in truth] == library.decode_batch(truth)
    assert (ours.kind, ours.vocab_size) == ("tokenizers", len(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_stay_text(folders: dict[str, Path], kind: str) -> None:
    ours, library = open_tokenizer(folders[kind]), Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    assert ours.special == {name: library.token_to_id(name) for name in SPECIAL[kind]}
    for name in SPECIAL[kind]:
        assert library.encode(name, add_special_tokens=False).ids == [ours.special[name]]  # what it does by itself
    for name in (*SPECIAL[kind], *LOOK_ALIKES):
        for text in (name, f"a{name}b", f" {name} {name}\n", f"{name}{name}"):
            ids = ours.encode(text)
            assert not {*ids} & {*ours.special.values()} - {ours.special.get("<unk>")}, text
            assert ours.decode(ids) == text
            assert ours.encode_batch([text.encode()], 1) == [ids]


def test_special_tokens_by_name(folders: dict[str, Path]) -> None:
    ours = open_tokenizer(folders["qwen2"])
    assert ours.token_id("<|im_start|>") == 601
    assert ours.decode([*ours.encode("hi"), ours.token_id("<|im_end|>"), ours.eos_id]) == "hi"


def test_added_tokens_that_are_not_special_are_the_librarys(folders: dict[str, Path]) -> None:
    ours = open_tokenizer(folders["qwen2"])
    number = ours.token_id("<tool_call>")
    assert number == ours.vocab_size - 1 and "<tool_call>" not in ours.special
    assert ours.encode("a<tool_call>") == [*ours.encode("a"), number]


def test_marks_and_bos(folders: dict[str, Path]) -> None:
    found = {kind: open_tokenizer(folder) for kind, folder in folders.items()}
    theirs = {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}
    for kind, ours in found.items():
        assert ours.bos_id == (-1 if theirs[kind].bos_token_id is None else theirs[kind].bos_token_id)
        assert ours.eos_id == theirs[kind].eos_token_id
        assert ours.add_bos == (theirs[kind].encode("a")[:1] == [theirs[kind].bos_token_id])
    assert {kind: ours.add_bos for kind, ours in found.items() if ours.add_bos} == {"llama3": True}


@pytest.mark.parametrize("told", [True, False])
def test_add_bos_token_goes_before_the_post_processor(folders: dict[str, Path], tmp_path: Path, told: bool) -> None:
    for kind in ("llama2", "llama3"):
        (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
        settings = {"bos_token": {"content": SPECIAL[kind][1 if kind == "llama2" else 0]}, "add_bos_token": told}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert open_tokenizer(tmp_path).add_bos is told


def test_limits_on_length_that_were_saved_do_not_count(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folders["llama3"] / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = open_tokenizer(folders["llama3"]).encode("Beautiful is better than ugly")
    ours = open_tokenizer(tmp_path)
    assert ours.encode("Beautiful is better than ugly") == ids and len(ids) > 4
    assert ours.encode_batch([b"Beautiful is better than ugly", b"a"], 1) == [ids, ours.encode("a")]


def test_what_the_config_calls_special_is(folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers makes special what tokenizer_config.json says, whatever tokenizer.json says."""
    (tmp_path / "tokenizer.json").write_bytes((folders["qwen2"] / "tokenizer.json").read_bytes())
    number = open_tokenizer(tmp_path).token_id("<tool_call>")
    token = {"content": "<tool_call>", "special": True, "normalized": False, "lstrip": False, "rstrip": False}
    settings = {"added_tokens_decoder": {str(number): token}, "pad_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = open_tokenizer(tmp_path)
    assert ours.special["<tool_call>"] == number and "a" not in ours.special
    assert number not in ours.encode("a<tool_call>") and ours.decode(ours.encode("a<tool_call>")) == "a<tool_call>"


def test_a_unigram_model_keeps_control_pieces_out_of_text(tmp_path: Path) -> None:
    """Such a model prefers a piece to its letters, and these files list control tokens as pieces."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((letter, -5.0) for letter in "<>sab\u2581")]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False, special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a<s>b").ids == [5, 1, 6]  # the library alone does not help
    assert open_tokenizer(tmp_path).encode("a<s>b") == [5, 2, 4, 3, 6]


def test_vocab_json_alone_is_refused_with_advice(tmp_path: Path) -> None:
    from test_tokenizer import refused

    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    assert refused(tmp_path) == (
        f"{tmp_path} has no tokenizer: llmpipe reads tokenizer.model (of SentencePiece or tiktoken), tekken.json or"
        " tokenizer.json; transformers makes a tokenizer.json of its vocab.json and merges.txt: run there python -c"
        " \"from transformers import AutoTokenizer as T; T.from_pretrained('.').save_pretrained('.')\""
    )

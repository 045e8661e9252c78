"""Which files of a directory are its tokenizer, and SentencePiece's kind against sentencepiece."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from adversarial import planes, texts
from data_help import train
from tokenizers import Tokenizer, models, processors

from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.data.tokenizers import beside
from llmpipe.errors import UserError
from tekken_twin import write_tekken


def test_directory_and_file_give_the_same(tokenizer_dir: Path) -> None:
    by_directory, by_file = open_tokenizer(tokenizer_dir), open_tokenizer(tokenizer_dir / "tokenizer.model")
    assert by_directory.sha256 == by_file.sha256
    assert (by_file.vocab_size, by_file.bos_id, by_file.eos_id) == (400, 1, 2)


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"normalizer": "nmt_nfkc"}])
def test_ids_are_sentencepieces(tmp_path: Path, options: dict) -> None:
    model = train(tmp_path / "tokenizer.model", 400, **options)
    truth, ours = sentencepiece.SentencePieceProcessor(model_file=str(model)), open_tokenizer(tmp_path)
    every = [*texts(), *planes()]
    ids = [truth.EncodeAsIds(text) for text in every]
    assert [ours.encode(text) for text in every] == ids
    assert ours.encode_batch([text.encode() for text in every], 2) == ids
    assert [ours.decode(numbers) for numbers in ids] == [truth.DecodeIds(numbers) for numbers in ids]
    if not options:
        assert [ours.decode(numbers) for numbers in ids] == [text.replace("\u2581", " ") for text in every]


def test_text_never_becomes_a_control_token(tokenizer_dir: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_dir)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode("<s>hello</s>"))


@pytest.mark.parametrize(("config", "expected"), [(None, False), ({}, False), ({"add_bos_token": True}, True)])
def test_add_bos_is_the_configs(tokenizer_dir: Path, tmp_path: Path, config: dict | None, expected: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert open_tokenizer(tmp_path).add_bos is expected


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_tokenizer(path)
    return str(error.value)


def test_refusals(tmp_path: Path) -> None:
    wanted = "tokenizer.model (of SentencePiece or tiktoken), tekken.json or tokenizer.json"
    missing = f"the tokenizer {tmp_path}/none is missing: name a directory with {wanted}, or that file"
    assert refused(tmp_path / "none") == missing
    assert refused(tmp_path) == f"{tmp_path} has no tokenizer: llmpipe reads {wanted}"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer.json is not a tokenizer of the tokenizers library (")
    (tmp_path / "tokenizer.model").write_text("not one")
    assert refused(tmp_path).startswith(f"{tmp_path}/tokenizer.model is neither a SentencePiece model nor tiktoken's")


def test_an_empty_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"tokenizer\.model is empty: copy or download it again"):
        open_tokenizer(tmp_path)


def put(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_added_tokens_have_ids_and_no_text_gives_them(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    settings = {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "400": {"content": "<|im_start|>"}}}
    put(tmp_path, added_tokens={"<|im_end|>": 401}, tokenizer_config=settings)
    bare, ours = open_tokenizer(tokenizer_dir), open_tokenizer(tmp_path)
    assert ours.special == {"<s>": 1, "</s>": 2, "<|im_start|>": 400, "<|im_end|>": 401}
    assert (bare.vocab_size, ours.vocab_size, ours.token_id("<|im_end|>")) == (400, 402, 401)
    text = "<|im_start|>user\nhi<|im_end|>"
    assert ours.encode(text) == bare.encode(text) and ours.decode(ours.encode(text)) == text
    assert ours.decode([1, 400, *ours.encode("hi"), 401, 2]) == "hi"


def test_user_defined_pieces_are_text_unless_called_special(tmp_path: Path) -> None:
    model = train(tmp_path / "tokenizer.model", 420, user_defined_symbols=["<|im_start|>", "<table>"])
    truth = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start, table = truth.piece_to_id("<|im_start|>"), truth.piece_to_id("<table>")
    put(tmp_path, added_tokens={"<|im_start|>": start, "<table>": table})
    text = "hello<|im_start|> <table>x"
    assert {start, table} < {*truth.EncodeAsIds(text)}, "what SentencePiece does by itself"
    assert open_tokenizer(tmp_path).encode(text) == truth.EncodeAsIds(text)
    assert not {"<|im_start|>", "<table>"} & open_tokenizer(tmp_path).special.keys()
    put(tmp_path, special_tokens_map={"additional_special_tokens": ["<|im_start|>"]})
    ours = open_tokenizer(tmp_path)
    assert ours.special["<|im_start|>"] == start
    assert start not in ours.encode(text) and table in ours.encode(text) and ours.decode(ours.encode(text)) == text
    others = [each for each in texts() if "<|im_start|>" not in each]
    assert [ours.encode(each) for each in others] == truth.EncodeAsIds(others)
    assert ours.decode([*ours.encode("a"), start]) == "a"


def test_ordinary_pieces_by_name(tokenizer_dir: Path) -> None:
    ours = open_tokenizer(tokenizer_dir)
    assert ours.token_id("<0x0A>") == 13 and ours.encode("<0x0A>") != [13]
    with pytest.raises(UserError) as error:
        ours.token_id("<s")
    assert str(error.value) == f"{tokenizer_dir}/tokenizer.model has no token '<s': did you mean '<s>'?"


def test_a_model_without_marks_takes_the_configs(tmp_path: Path) -> None:
    train(tmp_path / "tokenizer.model", 390, bos_id=-1, eos_id=-1)
    put(tmp_path, tokenizer_config={"add_bos_token": True})
    assert (open_tokenizer(tmp_path).bos_id, open_tokenizer(tmp_path).eos_id) == (-1, -1)
    assert not open_tokenizer(tmp_path).add_bos, "there is none to add"
    put(tmp_path, added_tokens={"<|end|>": 390}, special_tokens_map={"eos_token": {"content": "<|end|>"}})
    assert (open_tokenizer(tmp_path).bos_id, open_tokenizer(tmp_path).eos_id) == (-1, 390)


def test_sentencepiece_is_the_truth_beside_a_tokenizer_json(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    library = Tokenizer(models.WordLevel({"hello": 0}, "hello"))
    library.post_processor = processors.TemplateProcessing("<s> $A", None, special_tokens=[("<s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    write_tekken(tmp_path / "tekken.json", named=False)
    ours = open_tokenizer(tmp_path)
    assert (ours.kind, ours.path) == ("sentencepiece", tmp_path / "tokenizer.model")
    assert ours.add_bos, "as tokenizer.json does, where tokenizer_config.json does not say it"
    assert open_tokenizer(tmp_path / "tokenizer.json").encode("hello") == [0], "a file that is named is taken"
    (tmp_path / "tokenizer.model").unlink()
    assert open_tokenizer(tmp_path).kind == "mistral-common"


def test_every_file_is_known_by_its_hash(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    put(tmp_path, tokenizer_config={"add_bos_token": True}, config={})
    names = ("tokenizer.model", "tokenizer_config.json")
    hashes = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    assert open_tokenizer(tmp_path).files == hashes
    assert open_tokenizer(tmp_path).sha256 == hashes["tokenizer.model"]


@pytest.mark.parametrize(("content", "reason"), [("[]", "is no JSON object"), ("{", "is damaged")])
def test_damaged_files_beside_are_refused(tokenizer_dir: Path, tmp_path: Path, content: str, reason: str) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(content)
    assert refused(tmp_path).startswith(f"{tmp_path}/added_tokens.json {reason}")


@pytest.mark.parametrize(
    "order", [("added_tokens", "post_processor", "model"), ("model", "added_tokens", "post_processor")]
)
@pytest.mark.parametrize("name", ["<a>", '"model"', '{"model": 1'])
def test_added_tokens_of_a_json_in_any_order(tmp_path: Path, order: tuple[str, ...], name: str) -> None:
    parts = {"added_tokens": [{"id": 7, "content": name}], "post_processor": None, "model": {"vocab": {"b": 0}}}
    put(tmp_path, tokenizer={key: parts[key] for key in order})
    assert beside.added_tokens(tmp_path) == {name: 7}
    (tmp_path / "tokenizer.json").write_bytes(b'{"added_tokens": [], "post_processor": null, "x": "\xff", "model": 1}')
    with pytest.raises(UserError, match="is damaged"):
        beside.added_tokens(tmp_path)

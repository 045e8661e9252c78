"""tekken.json against what mistral-common 1.13.1 said of the same file."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from adversarial import LOOK_ALIKES, planes, texts

from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError
from tekken_twin import IDS, IDS_SHA256, NUM_SPECIAL, write_tekken


@pytest.mark.parametrize("named", [False, True])
def test_ids_are_mistral_commons(tmp_path: Path, named: bool) -> None:
    write_tekken(tmp_path / "tekken.json", named)
    ours, every = open_tokenizer(tmp_path), texts()
    assert (ours.kind, ours.vocab_size, ours.bos_id, ours.eos_id) == ("mistral-common", 299, 1, 2)
    found = {text: [ours.bos_id, *ours.encode(text), ours.eos_id] for text in IDS}
    assert found == IDS
    ids = [ours.encode(text) for text in every]
    assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == IDS_SHA256
    assert ours.encode_batch([text.encode() for text in every], 2) == ids
    assert [ours.decode(number) for number in ids] == every
    assert all(ours.decode(ours.encode(text)) == text for text in planes())


def test_special_tokens_have_ids_and_no_text_gives_them(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken_240911.json", named=False)
    ours = open_tokenizer(tmp_path / "tekken_240911.json")
    found = {
        name: ours.token_id(name) for name in ("<s>", "[INST]", "[/INST]", "<pad>", "[TOOL_CONTENT]", "<SPECIAL_20>")
    }
    assert found == {"<s>": 1, "[INST]": 3, "[/INST]": 4, "<pad>": 11, "[TOOL_CONTENT]": 19, "<SPECIAL_20>": 20}
    assert len(ours.special) == NUM_SPECIAL
    for text in LOOK_ALIKES:
        assert min(ours.encode(text)) >= NUM_SPECIAL
    assert ours.decode([3, *ours.encode("the"), 4, 2]) == "the"


def test_names_of_the_file(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", named=True)
    ours = open_tokenizer(tmp_path)
    assert (ours.token_id("[THINK]"), ours.token_id("<SPECIAL_6>")) == (5, 6)
    with pytest.raises(UserError, match=r"tekken\.json has no token '\[THINKS\]': did you mean '\[THINK\]'\?"):
        ours.token_id("[THINKS]")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    def said(change: dict[str, Any]) -> str:
        write_tekken(path, named=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(UserError) as error:
            open_tokenizer(path)
        return str(error.value)

    path = tmp_path / "tekken.json"
    write_tekken(path, named=True)
    content = json.loads(path.read_text())
    no = f"{path} is no tekken.json of Mistral"
    again = "copy or download it again"
    assert said({"config": {}}) == f"{no} (KeyError: 'default_num_special_tokens'): {again}"
    assert said({"special_tokens": None}) == f"{no} (ValueError: special_tokens are missing): {again}"
    assert said({"vocab": content["vocab"][:270]}) == f"{path} lacks tokens: it has 270, its config says 275: {again}"
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        open_tokenizer(path)

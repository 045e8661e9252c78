"""The card: its three forms, and the trainer's demand for it."""

import json
import re
from html.parser import HTMLParser

import pytest
from twins import sign

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.verify.card import Check, at_most, make_card, passed_card, require_card, write_card


def card_of(directory, verdict="pass"):
    checks = [at_most("KL divergence", 2e-9 if verdict == "pass" else 2e-6, 1e-8, "max |a| < b & so on")]
    subject = {"path": str(directory), "kind": "checkpoint", "digest": manifest.read(directory).digest}
    first = None if verdict == "pass" else "layer 3 (relative difference 1e-2)"
    return make_card(subject, {"path": "weights/x", "kind": "Meta", "digest": None}, checks, first)


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "config.json").write_text("{}")
    sign(path)
    return path


@pytest.fixture
def rank_files(checkpoint):
    path = checkpoint.parent / "tp2-pp2"
    path.mkdir()
    (path / "tp0-pp0.safetensors").write_text("weights")
    sign(path, "rank_files", {"checkpoint": manifest.read(checkpoint).digest})
    return path


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 1.1e-8])
def test_what_is_above_the_limit_or_no_number_fails(value):
    assert at_most("KL", value, 1e-8, "").verdict == "fail"
    assert at_most("KL", 1e-8, 1e-8, "").verdict == "pass"


def test_one_failed_check_or_a_difference_fails_the_card():
    good, bad = at_most("a", 0, 0, ""), at_most("b", 1, 0, "")
    skipped = Check("c", None, None, "not run", "")
    assert make_card({}, {}, [good, skipped], None)["verdict"] == "pass"
    assert make_card({}, {}, [good, bad], None)["verdict"] == "fail"
    assert make_card({}, {}, [good], "layer 0")["verdict"] == "fail"


def test_the_card_is_strict_json_and_a_table_of_five_columns(checkpoint):
    output = checkpoint.parent / "verify.json"
    assert write_card(card_of(checkpoint), output) == output
    card = json.loads(output.read_text(), parse_constant=pytest.fail)
    assert card["checks"][0] == {
        "name": "KL divergence", "value": 2e-9, "limit": 1e-8, "verdict": "pass", "detail": "max |a| < b & so on",
    }  # fmt: skip
    table = [line for line in output.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {6}  # a bar within a cell is escaped


def test_the_page_is_well_formed_and_needs_no_other_file(checkpoint):
    write_card(card_of(checkpoint, "fail"), checkpoint.parent / "verify.json")
    page = (checkpoint.parent / "verify.failed.html").read_text()
    cells: list[str] = []

    class Cells(HTMLParser):
        def handle_data(self, data):
            cells.append(data)

    Cells().feed(page)
    assert "max |a| < b & so on" in cells and "layer 3" in page
    assert not re.search(r"(src|href)=", page)


def test_a_failing_card_takes_the_passing_one_away_and_the_other_way_round(checkpoint):
    folder, output = checkpoint.parent, checkpoint.parent / "verify.json"
    write_card(card_of(checkpoint), output)
    assert write_card(card_of(checkpoint, "fail"), output) == folder / "verify.failed.json"
    assert {p.name for p in folder.glob("verify*")} == {f"verify.failed.{form}" for form in ("json", "md", "html")}
    write_card(card_of(checkpoint), output)
    assert {p.name for p in folder.glob("verify*")} == {f"verify.{form}" for form in ("json", "md", "html")}


def test_a_card_speaks_of_the_bytes_it_saw_alone(checkpoint):
    write_card(card_of(checkpoint), checkpoint.parent / "verify.json")
    assert passed_card(checkpoint) is not None
    (checkpoint / "config.json").write_text('{"rope_theta": 1}')
    sign(checkpoint)
    assert passed_card(checkpoint) is None


def test_an_unverified_checkpoint_is_refused_with_the_command(checkpoint):
    output = checkpoint.parent / "verify.json"
    command = f"run `llmpipe verify {checkpoint} --reference SOURCE --output {output}`"
    with pytest.raises(UserError, match=re.escape(f"is not verified: first {command}")):
        require_card(checkpoint)
    write_card(card_of(checkpoint, "fail"), output)
    words = f"its last verification failed, see {output.with_suffix('.failed.md')}; mend it, then {command}"
    with pytest.raises(UserError, match=re.escape(words)):
        require_card(checkpoint)
    write_card(card_of(checkpoint), output)
    require_card(checkpoint)


def test_rank_files_need_their_own_card_and_their_checkpoints(checkpoint, rank_files):
    folder = checkpoint.parent
    with pytest.raises(UserError, match=re.escape(f"llmpipe verify {rank_files} --reference {checkpoint} --output")):
        require_card(rank_files)
    write_card(card_of(rank_files), folder / "tp2-pp2.verify.json")
    words = f"has no passing card in {folder}: run `llmpipe verify {checkpoint} --reference SOURCE"
    with pytest.raises(UserError, match=re.escape(words)):
        require_card(rank_files)
    write_card(card_of(checkpoint), folder / "verify.json")
    require_card(rank_files)

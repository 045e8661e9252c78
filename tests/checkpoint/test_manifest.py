"""Manifests: the files' hashes by hashlib, and what a damaged directory is told."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_bytes(b"two")
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / ".snakemake_timestamp").touch()
    manifest.write(tmp_path, "checkpoint", {"path": "x"})
    return tmp_path


def test_every_file_is_hashed_and_hidden_ones_are_not(made: Path) -> None:
    written = json.loads((made / "manifest.json").read_text())
    assert (written["kind"], written["source"]) == ("checkpoint", {"path": "x"})
    assert written["files"] == {
        "a": {"sha256": hashlib.sha256(b"one").hexdigest(), "bytes": 3},
        "sub/b": {"sha256": hashlib.sha256(b"two").hexdigest(), "bytes": 3},
    }
    assert manifest.check(made).files == written["files"]


def test_digest_is_of_the_contents_alone(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "sub").mkdir()
    (other / "a").write_bytes(b"one")
    (other / "sub/b").write_bytes(b"two")
    digest = manifest.write(other, "checkpoint", {"path": "y"}).digest
    assert digest == manifest.read(made).digest
    (other / "a").write_bytes(b"six")
    assert manifest.write(other, "checkpoint", {"path": "y"}).digest != digest


def test_the_contents_of_a_training_checkpoint_count(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"one")
    assert manifest.write(tmp_path, "training_checkpoint", {}).files.keys() == {".metadata"}
    (tmp_path / ".metadata").write_bytes(b"six")
    with pytest.raises(UserError, match=r"\.metadata does not have the SHA-256"):
        manifest.check(tmp_path)


def test_parts_of_a_check_cover_all_files(made: Path) -> None:
    (made / "sub/b").write_bytes(b"six")
    manifest.check(made, 0, 2)
    with pytest.raises(UserError, match="sub/b does not have the SHA-256"):
        manifest.check(made, 1, 2)


def test_known_hashes_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    assert manifest.write(tmp_path, "checkpoint", {}, {"a": "f00d"}).files["a"]["sha256"] == "f00d"


def test_damage_is_named(made: Path) -> None:
    (made / "a").write_bytes(b"One")
    with pytest.raises(
        UserError, match=re.escape(f"{made / 'a'} does not have the SHA-256 that manifest.json says: it was")
    ):
        manifest.check(made)
    (made / "a").write_bytes(b"on")
    with pytest.raises(
        UserError, match=re.escape(f"{made / 'a'} has 2 bytes, but manifest.json says 3: it is truncated")
    ):
        manifest.check(made)
    (made / "a").unlink()
    with pytest.raises(
        UserError, match=re.escape(f"{made / 'a'} is missing, but manifest.json lists it: run the stage that")
    ):
        manifest.check(made)
    (made / "manifest.json").write_text('{"llmpipe": "0.1.0"}')
    with pytest.raises(
        UserError, match=re.escape(f"{made / 'manifest.json'} is damaged ('kind'): run the stage that makes")
    ):
        manifest.check(made)
    (made / "manifest.json").write_text('{"name": "an app of another tool"}')
    assert not manifest.has(made)
    with pytest.raises(
        UserError, match=re.escape(f"{made} has no manifest.json: it is not a finished output of llmpipe")
    ):
        manifest.read(made)


def test_a_manifest_that_is_no_object_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*: run the stage that makes it again"):
        manifest.read(tmp_path)


ADAPTER = {"path": "a", "files": {"adapter_config.json": "f00d"}}


@pytest.mark.parametrize(("source", "told"), [
    ({"adapter": ADAPTER | {"path": 5}}, "its source's adapter says 5, expected text"),
    ({"adapter": ADAPTER | {"files": {"adapter_config.json": None}}}, "its source's adapter says None, expected text"),
    ({"adapter": ADAPTER | {"files": 5}}, "Value after * must be an iterable, not int"),
    ({"adapter": {}}, "'files'"),
    ({"adapter": "a"}, "its source's adapter is 'a'"),
    ({"told": []}, "its source's told is []"),
    ({"added_tokens": 5}, "its source's added_tokens is 5"),
    ({"added_tokens": ["<a>"], "new_rows": 5}, "its source's new_rows is 5"),
    ({"added_tokens": ["<a>"]}, "'new_rows'"),
])  # fmt: skip
def test_a_source_that_llmpipe_did_not_write_is_told(made: Path, source: dict, told: str) -> None:
    written = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(written | {"source": {"adapter": ADAPTER}}))
    manifest.check(made)
    (made / "manifest.json").write_text(json.dumps(written | {"source": source}))
    with pytest.raises(UserError, match=re.escape(f"manifest.json is damaged ({told}): run the stage that makes it")):
        manifest.check(made)


def test_a_manifest_that_lists_no_files_is_no_proof(made: Path) -> None:
    (made / "manifest.json").write_text(
        json.dumps({"llmpipe": "0.1.0", "kind": "checkpoint", "source": {}, "files": {}})
    )
    with pytest.raises(
        UserError, match=r"manifest\.json is damaged \(it lists no files\): run the stage that makes it"
    ):
        manifest.read(made)


def test_weights_that_a_manifest_does_not_list_are_told(made: Path) -> None:
    (made / "model.safetensors").write_bytes(b"six")
    with pytest.raises(
        UserError, match=r"model\.safetensors is not in manifest\.json, and nothing says that it is whole"
    ):
        manifest.check(made)


def test_a_directory_is_replaced_only_if_it_is_empty_or_ours(
    made: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest.check_replaceable(made)
    (made / "manifest.json").write_text('{"llmpipe": "0.1.0", ')  # ours, damaged
    manifest.check_replaceable(made)
    empty = tmp_path_factory.mktemp("empty")
    manifest.check_replaceable(empty)
    (empty / ".snakemake_timestamp").touch()
    manifest.check_replaceable(empty)
    manifest.check_replaceable(empty / "none")


@pytest.mark.parametrize("name", [".bashrc", "notes", "manifest.json"])
def test_what_others_made_is_kept(name: str, tmp_path: Path) -> None:
    """Hidden files count: a home directory has no others. An extension's manifest.json is not ours."""
    (tmp_path / name).write_text('{"manifest_version": 3}')
    with pytest.raises(UserError, match=rf"--output {re.escape(str(tmp_path))} holds {re.escape(name)} and no"):
        manifest.check_replaceable(tmp_path)
    with pytest.raises(UserError, match=r"is a file, which a directory does not replace"):
        manifest.check_replaceable(tmp_path / name)

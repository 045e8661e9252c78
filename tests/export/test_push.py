"""`llmpipe export --push-to-hub` to a server that speaks the hub's protocol."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from hub_upload_server import TOKEN, UploadHub, serving
from llmpipe.checkpoint.convert import CHECKPOINT, Target
from llmpipe.cli import group
from llmpipe.errors import UserError
from llmpipe.export import export as exporter
from llmpipe.export.export import export_and_push

# huggingface_hub's own, of the way that it gives a file to httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = "me/tiny"
Push = Callable[..., str]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[UploadHub]:
    """The server, and this process as a user's who logged in to it; nothing of this machine's."""
    with serving(UploadHub()) as hub:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        yield hub


@pytest.fixture
def push(checkpoint: Path, tmp_path: Path) -> Push:
    """Export and upload."""

    def pushed(repository: str = REPOSITORY, target: Target = CHECKPOINT) -> str:
        return export_and_push(checkpoint, tmp_path / "out", target, repository)

    return pushed


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_stands_on_the_hub_is_the_export(hub: UploadHub, push: Push, tmp_path: Path) -> None:
    assert push() == f"{hub.url}/{REPOSITORY}"
    assert hub.repositories[REPOSITORY] == files_of(tmp_path / "out")
    assert hub.private == {REPOSITORY: True}
    there = tmp_path / "there"
    there.mkdir()
    for name, content in hub.repositories[REPOSITORY].items():
        (there / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(there).config.vocab_size == 384


def test_by_the_command_and_only_if_asked(hub: UploadHub, checkpoint: Path, tmp_path: Path) -> None:
    command = ["export", str(checkpoint), "--output", str(tmp_path / "out"), "--to", "easylm"]
    assert CliRunner().invoke(group, command, catch_exceptions=False).exit_code == 0
    assert not hub.asked
    assert CliRunner().invoke(group, [*command, "--push-to-hub", REPOSITORY], catch_exceptions=False).exit_code == 0
    assert hub.repositories[REPOSITORY] == files_of(tmp_path / "out")


def test_folders_go_along(hub: UploadHub, push: Push, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = Target("megatron", "legacy", tp=2)
    push(target=target)
    assert hub.repositories[REPOSITORY] == files_of(tmp_path / "out")
    assert "iter_0000001/mp_rank_01/model_optim_rng.pt" in hub.repositories[REPOSITORY]
    caplog.set_level("INFO")
    push(target=target)
    assert f"{tmp_path / 'out'} is this export already, and whole" in caplog.text


def test_an_upload_that_broke_off_goes_on(
    hub: UploadHub, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is refused; then a connection breaks in the middle of a file, every time; then all is well."""
    exports, export = [], exporter.export
    monkeypatch.setattr(exporter, "export", lambda *given: exports.append(export(*given)))
    hub.busy_commits = 1
    with pytest.raises(UserError, match=r"answers 503 .*: run this again later; what was uploaded is not sent again"):
        push()
    assert not hub.repositories[REPOSITORY]
    sent = list(hub.puts)
    assert sorted(sent) == sorted(lfs_files(tmp_path / "out"))
    hub.objects.pop(sent[0])
    hub.broken_puts = 99
    with pytest.raises(UserError, match=r"is not reached, or the connection broke .*: run this again where the hub is"):
        push()
    assert set(hub.puts[len(sent) :]) == {sent[0]} and not hub.repositories[REPOSITORY]
    hub.broken_puts = 0
    tries = len(hub.puts)
    push()
    assert hub.puts[tries:] == [sent[0]]
    assert hub.repositories[REPOSITORY] == files_of(tmp_path / "out")
    assert len(exports) == 1  # the export was made and checked once


def lfs_files(directory: Path) -> list[str]:
    names = ("model.safetensors", "tokenizer.model")
    return [hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names]


def test_another_export_is_made_anew(hub: UploadHub, push: Push, tmp_path: Path) -> None:
    push()
    push(target=Target("meta"))
    assert (tmp_path / "out" / "params.json").is_file()


def test_a_changed_export_is_not_uploaded(hub: UploadHub, push: Push, tmp_path: Path) -> None:
    push()
    (tmp_path / "out" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README\.md has 4 bytes, but manifest\.json says"):
        push()
    assert hub.repositories[REPOSITORY]["README.md"] != b"mine"


def test_files_of_an_older_model_are_named(hub: UploadHub, push: Push, caplog: pytest.LogCaptureFixture) -> None:
    hub.repositories[REPOSITORY] = {"pytorch_model.bin": b"old", ".gitattributes": b"lfs"}
    push()
    assert f"{hub.url}/{REPOSITORY} holds other files, too, and these stay: pytorch_model.bin" in caplog.text
    assert hub.repositories[REPOSITORY]["pytorch_model.bin"] == b"old"


@pytest.mark.parametrize("case", ["no token", "refused", "reads only"])
def test_a_token_that_will_not_do_is_told_before_anything_is_made(
    hub: UploadHub, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    match case:
        case "no token":
            monkeypatch.delenv("HF_TOKEN")
            told = "no token was found"
        case "refused":
            monkeypatch.setenv("HF_TOKEN", "hf_old")
            told = f"{hub.url} refuses the token"
        case _:
            hub.role = "read"
            told = "your token may read only"
    with pytest.raises(UserError) as raised:
        push()
    assert str(raised.value) == (
        f"--push-to-hub me/tiny: {told}: run `hf auth login`, or set HF_TOKEN, with a token that may write"
        f" ({hub.url}/settings/tokens)"
    )
    assert not (tmp_path / "out").exists() and not hub.repositories


def test_another_owners_repository(hub: UploadHub, push: Push) -> None:
    with pytest.raises(UserError, match=r"--push-to-hub theirs/tiny: your token may not write there: ask its owner"):
        push("theirs/tiny")
    assert not hub.puts


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "me/ti ny"])
def test_names_that_are_none(hub: UploadHub, push: Push, name: str) -> None:
    with pytest.raises(UserError, match=f"--push-to-hub {name}: a repository is named ORG/NAME or USER/NAME"):
        push(name)
    assert not hub.asked


def test_a_hub_that_is_not_there(push: Push, hub: UploadHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 is not reached, or the connection broke"):
        push()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids to ask the hub: unset it"):
        push()


def test_nothing_is_uploaded_if_a_check_fails(hub: UploadHub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UserError("the round trip differs")

    monkeypatch.setattr("llmpipe.export.export.check_round_trip", refuse)
    with pytest.raises(UserError, match="the round trip differs"):
        push()
    assert [path for _, path in hub.asked] == ["/api/whoami-v2"]

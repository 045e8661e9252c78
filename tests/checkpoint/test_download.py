"""Downloads from a server that speaks the hub's protocol, by the command, as a user runs it."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub_server import COMMIT, Hub, files_of, git_hash, serving
from llmpipe.checkpoint import manifest

WEIGHTS = bytes(range(256)) * 40
NEEDED = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer.json": b'{"model": 1}',
    "LICENSE.txt": b"a licence",
    "USE_POLICY.md": b"a policy",
    "model.safetensors": WEIGHTS,
}
OTHER = {
    "README.md": b"a card",
    ".gitattributes": b"lfs",
    "pytorch_model.bin": b"the same as a pickle",
    "consolidated.safetensors": b"the same under other names",
    "original/consolidated.00.pth": b"the same as Meta has it",
    "original/params.json": b'{"dim": 4}',
    "original/tokenizer.model": b"Meta's pieces",
    "onnx/model.onnx": b"the same again",
}
# huggingface_hub waits between its attempts; a test need not.
QUICKLY = """
import time
time.sleep = lambda seconds: None
from llmpipe.checkpoint import hub
hub.WAITS = (0,) * 9
from llmpipe.cli import main
main()
"""
Download = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(NEEDED | OTHER)) as hub:
        yield hub


def command(hub: Hub, folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and its environment: a home of its own, nothing of this machine's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return [sys.executable, "-c", QUICKLY, "download", *arguments, "--output", str(folder / "out")], environment


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Download:
    """Runs `llmpipe download ARGUMENTS --output out`; keywords are environment variables."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        words, environment = command(hub, tmp_path, *arguments)
        return subprocess.run(words, env=environment | variables, capture_output=True, text=True, check=False)

    return run


def fetched(hub: Hub) -> set[str]:
    """The files whose contents were sent."""
    return set(hub.sent) - {""}


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The error's line."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1].split(" ERROR ", 1)[1]


def test_what_a_model_needs_and_no_more(hub: Hub, download: Download, tmp_path: Path) -> None:
    done = download("hf://org/tiny@v1.0")
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "out") == NEEDED
    assert fetched(hub) == NEEDED.keys()
    assert "names no revision" not in done.stderr
    written = manifest.check(tmp_path / "out")
    assert (written.kind, written.source) == (
        "download",
        {"path": "hf://org/tiny", "revision": "v1.0", "commit": COMMIT},
    )
    assert {name: entry["sha256"] for name, entry in written.files.items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in NEEDED.items()
    }


def test_a_revision_left_out_is_told(download: Download, tmp_path: Path) -> None:
    done = download("hf://org/tiny")
    assert f"hf://org/tiny names no revision: main is taken, now hf://org/tiny@{COMMIT}" in done.stderr
    assert manifest.read(tmp_path / "out").source["revision"] == "main"


def test_weights_are_on_the_disk_once_and_nothing_is_asked_twice(hub: Hub, download: Download, tmp_path: Path) -> None:
    download("hf://org/tiny@main")
    [blob] = (tmp_path / "home/hub").rglob(f"blobs/{hashlib.sha256(WEIGHTS).hexdigest()}")
    assert blob.samefile(tmp_path / "out/model.safetensors")
    assert (tmp_path / "out/config.json").stat().st_nlink == 1
    before = dict(hub.sent)
    (tmp_path / "out/config.json").write_text("edited")
    assert download("hf://org/tiny@main").returncode == 0
    assert hub.sent[""] > before.pop("") and {name: hub.sent[name] for name in before} == before
    assert files_of(tmp_path / "out") == NEEDED


def test_the_token_goes_to_the_hub_and_not_to_the_cdn(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.token = "hf_mine"
    assert download("hf://org/tiny@main", HF_TOKEN="hf_mine").returncode == 0
    sent = {path.startswith("/cdn/"): bearer for _, path, _, bearer in hub.asked if "agent" not in path}
    assert sent == {True: None, False: "Bearer hf_mine"}
    (tmp_path / "home/token").write_text("hf_mine")  # as `hf auth login` leaves it
    assert download("hf://org/tiny@main").returncode == 0


def test_an_index_decides_which_files_are_weights(hub: Hub, download: Download, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    shards = {f"model-0000{number}-of-00002.safetensors": bytes([number]) * 99 for number in (1, 2)}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    hub.files |= {**shards, "model.safetensors.index.json": json.dumps(index).encode()}
    assert download("hf://org/tiny@main").returncode == 0
    found = files_of(tmp_path / "out")
    assert {name for name in found if "safetensors" in name} == {*shards, "model.safetensors.index.json"}
    del hub.files["model-00002-of-00002.safetensors"]
    hub.files["model.safetensors.index.json"] += b" "  # another file than the cached one
    (tmp_path / "home").rename(tmp_path / "old")
    assert "names model-00002-of-00002.safetensors, and the repository has none" in refused(download("hf://org/tiny"))


def test_meta_and_pickled_weights_when_asked_or_alone(hub: Hub, download: Download, tmp_path: Path) -> None:
    assert download("hf://org/tiny@main", "--weights", "meta").returncode == 0
    found = files_of(tmp_path / "out")
    assert found["consolidated.00.pth"] == OTHER["original/consolidated.00.pth"]
    assert found["tokenizer.model"] == OTHER["original/tokenizer.model"]
    assert found.keys() == NEEDED.keys() - {"config.json", "model.safetensors"} | {"consolidated.00.pth", "params.json"}
    del hub.files["model.safetensors"]
    assert download("hf://org/tiny@main").returncode == 0
    assert files_of(tmp_path / "out").keys() == NEEDED.keys() - {"model.safetensors"} | {"pytorch_model.bin"}
    told = refused(download("hf://org/tiny@main", "--weights", "safetensors"))
    assert told == "hf://org/tiny has no weights of format safetensors, but bin, meta"


def test_other_repositories_take_a_pattern(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files = {"adapter_model.safetensors": b"a", "adapter_config.json": b"{}", "run/checkpoint_1": b"c"}
    told = refused(download("hf://org/tiny@main"))
    assert told == (
        "hf://org/tiny has no weights that llmpipe knows: adapter_config.json, adapter_model.safetensors,"
        " run/checkpoint_1 found; expected model.safetensors, pytorch_model.bin, or Meta's or Mistral's"
        " consolidated.* with params.json. --include PATTERN fetches other files"
    )
    assert "--include x*: hf://org/tiny has no such file" in refused(download("hf://org/tiny@main", "--include", "x*"))
    assert download("hf://org/tiny@main", "--include", "adapter_*", "--include", "run/*").returncode == 0
    assert files_of(tmp_path / "out") == hub.files


def test_a_file_outside_of_the_output_is_refused(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files["../evil"] = b"!"
    assert "would lie outside of the output" in refused(download("hf://org/tiny@main", "--include", "*evil"))
    assert not (tmp_path / "evil").exists() and not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_files(hub: Hub, download: Download, tmp_path: Path) -> None:
    lines = download("hf://org/tiny@main", "--dry-run").stdout.splitlines()
    assert lines[0] == f"would make {tmp_path}/out of hf://org/tiny@{COMMIT}"
    assert lines[1:-1] == [f"  {len(content):>15,}  {name}" for name, content in sorted(NEEDED.items())]
    assert lines[-1] == f"would fetch {sum(map(len, NEEDED.values())):,} bytes to {tmp_path}/home/hub"
    assert not fetched(hub) and not (tmp_path / "out").exists()
    assert download("hf://org/tiny@main").returncode == 0
    lines = download("hf://org/tiny@main", "--dry-run").stdout.splitlines()
    assert all(line.endswith(", in the cache") for line in lines[1:-1])
    assert lines[-1].startswith("would fetch 0 bytes to ")


def test_a_disk_that_is_too_small_is_told_before_anything_is_fetched(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.sizes["model.safetensors"] = 1 << 60
    told = refused(download("hf://org/tiny@main"))
    assert re.match(rf"hf://org/tiny takes [\d,]{{25}} bytes in {tmp_path}/home/hub, and [\d,]+ are free there: ", told)
    assert not fetched(hub)


def test_an_address_that_is_no_hub(hub: Hub, download: Download) -> None:
    hub.page = b"<html>a page</html>"
    told = refused(download("hf://org/tiny@main"))
    assert told == (
        f"{hub.url} does not answer on org/tiny as a hub does: HF_ENDPOINT has to be a hub's address, or unset"
    )


def test_a_cut_file_goes_on_where_it_was_cut(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = os.urandom(12 << 20)
    hub.cuts["model.safetensors"] = [11 << 20]
    assert download("hf://org/tiny@main").returncode == 0
    ranges = [span for method, span in hub.requests("model.safetensors") if method == "GET"]
    assert ranges == [None, f"bytes={10 << 20}-"]  # huggingface_hub writes chunks of 10 MiB
    assert (tmp_path / "out/model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_file_that_huggingface_hub_gave_up_is_asked_for_again(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [1] * 8  # it gives up after 6, older ones after 1
    done = download("hf://org/tiny@main")
    assert done.returncode == 0 and "trying again in 0 s" in done.stderr
    assert files_of(tmp_path / "out") == NEEDED


def test_a_network_that_stays_away_is_told_and_whole_files_are_kept(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.cuts["model.safetensors"] = [0]
    told = refused(download("hf://org/tiny@main"))
    assert told.startswith(f"hf://org/tiny: model.safetensors: {hub.url} is not reached, or the connection broke (")
    assert told.endswith(f"whole files are kept in {tmp_path}/home/hub")
    assert not (tmp_path / "out").exists()
    kept = {path.name: hub.sent[path.name] for path in (tmp_path / "home").rglob("snapshots/*/*")}
    hub.cuts.clear()
    assert download("hf://org/tiny@main").returncode == 0
    assert kept == {name: hub.sent[name] for name in kept} and files_of(tmp_path / "out") == NEEDED


def test_killed_and_run_again_it_fetches_what_was_not_whole(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.hang_after["model.safetensors"] = 1000
    words, environment = command(hub, tmp_path, "hf://org/tiny@main")
    started = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    small = NEEDED.keys() - {"model.safetensors"}
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "home").rglob("snapshots/*/*"))) < len(small) or not hub.sent.get("model.safetensors"):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.part"))
    hub.hang_after.clear()
    before = {name: hub.sent[name] for name in small}
    assert download("hf://org/tiny@main").returncode == 0
    assert before == {name: hub.sent[name] for name in small}
    assert files_of(tmp_path / "out") == NEEDED
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_fetched_again_and_then_refused(
    name: str, hub: Hub, download: Download, tmp_path: Path
) -> None:
    wrong = bytes(reversed(NEEDED[name]))
    hub.wrong[name] = [wrong, wrong]
    told = refused(download("hf://org/tiny@main"))
    hashed = git_hash if name == "config.json" else lambda content: hashlib.sha256(content).hexdigest()
    assert re.match(f"hf://org/tiny: {name} is damaged: it has the (SHA-256|git hash) {hashed(wrong)},", told)
    assert f" the hub says {hashed(NEEDED[name])}: " in told
    assert not (tmp_path / "out").exists()
    done = download("hf://org/tiny@main")  # what lies in the cache now is wrong, the hub is not
    assert done.returncode == 0 and f"{name} in the cache is damaged: fetching it again" in done.stderr
    assert files_of(tmp_path / "out") == NEEDED


def test_a_cache_that_rotted_is_mended(download: Download, tmp_path: Path) -> None:
    assert download("hf://org/tiny@main").returncode == 0
    [blob] = (tmp_path / "home/hub").rglob(f"blobs/{hashlib.sha256(WEIGHTS).hexdigest()}")
    (tmp_path / "out/model.safetensors").unlink()
    blob.write_bytes(WEIGHTS[:-1] + b"!")
    assert download("hf://org/tiny@main").returncode == 0
    assert files_of(tmp_path / "out") == NEEDED and blob.read_bytes() == WEIGHTS


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository(status: int, hub: Hub, download: Download) -> None:
    hub.token, hub.refusal, hub.gated_files = "hf_mine", (status, "GatedRepo"), True
    told = refused(download("hf://org/tiny@main"))
    page = f"ask for access on {hub.url}/org/tiny, then run `hf auth login` or set HF_TOKEN"
    assert re.fullmatch(rf"hf://org/tiny: \S+ is gated, and no token was found: {page}", told)
    assert "is gated, and your token is not allowed to: ask" in refused(
        download("hf://org/tiny@main", HF_TOKEN="hf_other")
    )


def test_a_token_that_is_refused(hub: Hub, download: Download) -> None:
    hub.token, hub.refusal = "hf_mine", (403, "")
    told = refused(download("hf://org/tiny@main", HF_TOKEN="hf_old"))
    assert told == f"hf://org/tiny: {hub.url} refuses the token: run `hf auth login` or set HF_TOKEN anew"


def test_no_such_repository_or_revision(hub: Hub, download: Download) -> None:
    assert refused(download("hf://org/tinny@main")) == (
        f"hf://org/tinny is not there or private, and no token was found: compare the name with {hub.url}/org/tinny;"
        " for a private one run `hf auth login` or set HF_TOKEN"
    )
    assert refused(download("hf://org/tiny@v2")) == (
        f"hf://org/tiny has no revision 'v2': its branches, tags and commits are on {hub.url}/org/tiny/tree/main"
    )
    assert refused(download("hf://tiny")) == (
        "hf://tiny names no repository of the Hugging Face hub: hf://ORG/NAME or hf://ORG/NAME@REV does"
    )


def test_offline_asks_nobody(hub: Hub, download: Download, tmp_path: Path) -> None:
    told = refused(download("hf://org/tiny@main", HF_HUB_OFFLINE="1"))
    folder = tmp_path / "home/hub/models--org--tiny/snapshots"
    assert told == (
        "hf://org/tiny: HF_HUB_OFFLINE forbids to ask the hub: unset it, or name a folder that is there already, as"
        f" those in {folder} are, instead of hf://"
    )
    assert not hub.asked


def test_a_hub_that_is_not_there_or_ill(hub: Hub, download: Download) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = refused(download("hf://org/tiny@main", HF_ENDPOINT=address))
    assert told.startswith(f"hf://org/tiny: {address} is not reached, or the connection broke (")
    hub.status = 503
    told = refused(download("hf://org/tiny@main"))
    assert told == f"hf://org/tiny: {hub.url} answers 503: run this again later; whole files are kept"


def test_what_llmpipe_did_not_make_is_not_replaced(hub: Hub, download: Download, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    assert "holds mine and no manifest.json of llmpipe's: llmpipe did not make it" in refused(
        download("hf://org/tiny@main")
    )
    assert not hub.asked

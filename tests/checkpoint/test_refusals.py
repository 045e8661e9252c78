"""What whole commands refuse, a full disk, /dev/shm, and plans of the largest model from its headers alone."""

import errno
import json
import re
import shutil
import sys
from pathlib import Path

import damaged
import pytest
import torch

from llmpipe.checkpoint import manifest, meta_params, meta_write, mover
from llmpipe.checkpoint.containers.safetensors_file import Entry, header_bytes, split, write_index
from llmpipe.checkpoint.containers.torch_skeleton import write_skeleton
from llmpipe.checkpoint.convert import Target, convert, plan_convert, plan_shard, shard
from llmpipe.checkpoint.formats import Told
from llmpipe.checkpoint.layouts import hf_layout
from llmpipe.cli import main
from llmpipe.families import FAMILIES, named_size, to_hf_config
from llmpipe.layout import Stages


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    damaged.write_hf(root / "hf", damaged.tensors(), 1)
    convert(root / "hf", root / "checkpoint")
    convert(root / "hf", root / "easylm", Target("easylm"))
    shard(root / "checkpoint", root / "ranks", 2, Stages(2))
    return root


def llmpipe(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of a command line; an error that is not for the user is raised."""
    monkeypatch.setattr(sys, "argv", ["llmpipe", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "meta", "--pp", "2"), "--to meta has no pipeline stages"),
        (("--to", "meta", "--tp", "3"), "--tp 3: Meta's files share 4 KV heads"),
        (("--tp", "2"), "--to hf is not split: leave out --tp"),
        (("--dialect", "legacy"), "--dialect legacy is one of --to megatron, not of --to hf"),
        (("--to", "easylm", "--dialect", "ali"), "--dialect ali is one of --to megatron"),
        (("--to", "easylm", "--tp", "2"), "--to easylm is not split"),
        (("--to", "megatron", "--tp", "3"), "tp has to be one of [1, 2, 4]"),
        (("--to", "megatron", "--dialect", "epf", "--tp", "8"), "tp has to be one of [1, 2, 4]"),
        (("--to", "megatron", "--pp", "3"), "4 layers"),
        (("--to", "megatron", "--pp", "2", "--pp-layers", "2,3"), "that make 4 layers"),
        (("--shape", "llama2_8b"), "shape 'llama2_8b' is in no family's size table: did you mean"),
        (("--shape", "llama2_7b"), "num_layers is 4, expected 32"),
        (("--vocab", "131"), "--source-dialect and --vocab do not apply to it"),
        (("--to", "meta", "--add-token", "<new>"), "--to meta takes no --add-token"),
    ],
)
def test_options_that_cannot_be(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    assert llmpipe(monkeypatch, "convert", models / "hf", "--output", tmp_path / "out", *options) == 1
    assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").write_text("mine")
    hf, ranks = models / "hf", models / "ranks"
    for command, source, output, message in (
        ("convert", hf, hf / "out", "lies inside the source"),
        ("convert", hf, models, "holds the source"),
        ("shard", models / "checkpoint", models / "checkpoint", "holds the source"),
        ("merge", ranks, tmp_path / "notes", "is a file, which a directory does not replace"),
        ("convert", tmp_path / "none", tmp_path / "out", "is missing: there may stand"),
        ("convert", tmp_path / "notes", tmp_path / "out", "is a file: there may stand"),
        ("convert", f"params::{models / 'none'}", tmp_path / "out", "is missing: there may stand"),
        ("convert", f"parms::{models / 'easylm'}", tmp_path / "out", "is none of EasyLM's params"),
        ("convert", f"trainstate::{models / 'easylm/streaming_params'}", tmp_path / "out", "but is of params::"),
        ("shard", hf, tmp_path / "out", "has no manifest.json"),
    ):
        capfd.readouterr()
        assert llmpipe(monkeypatch, command, source, "--output", output) == 1
        assert message in capfd.readouterr().err
    assert (tmp_path / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_verify_says_what_is_wrong_with_a_damaged_reference(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reference = shutil.copytree(models / "hf", tmp_path / "reference")
    weights = reference / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "none")
    assert llmpipe(monkeypatch, "verify", models / "checkpoint", "--reference", reference) == 1
    assert f"{weights} is missing" in capfd.readouterr().err


def test_a_link_to_a_directory_stays_one(models: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    for _ in range(2):
        convert(models / "hf", tmp_path / "out")
        assert (tmp_path / "out").is_symlink() and (tmp_path / "large/manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]


WRITERS = {
    "hf": ("convert", "--dtype", "bf16"),
    "meta": ("convert", "--to", "meta", "--tp", "2"),
    "megatron": ("convert", "--to", "megatron", "--tp", "2", "--pp", "2"),
    "easylm": ("convert", "--to", "easylm"),
    "shard": ("shard", "--tp", "2"),
}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    name: str, number: int,
) -> None:  # fmt: skip
    write, left = mover._write_all, [60_000]

    def full(descriptor: int, chunk: "mover.np.ndarray", offset: int | None = None) -> None:
        left[0] -= len(chunk)
        if left[0] < 0:
            raise OSError(number, "the disk says no")
        write(descriptor, chunk, offset)

    monkeypatch.setattr(mover, "_write_all", full)
    command, *options = WRITERS[name]
    source, output = models / ("checkpoint" if name == "shard" else "hf"), tmp_path / "out"
    assert llmpipe(monkeypatch, command, source, *options, "--output", output) == 1
    assert re.search(r"the disk says no: (make room|raise the limit|the disk itself)", capfd.readouterr().err)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(mover, "_write_all", write)
    assert llmpipe(monkeypatch, command, source, *options, "--output", output) == 0


def test_killed_at_any_moment_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form of benchmarks/kill_drill.py, which raises where anything is not as it should be."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from kill_drill import drill

    lines = list(drill(tmp_path / "drill", kills=3, layers=30, chosen=["convert-mcore"], seed=1))
    assert len(lines) == 3 and all(line.endswith("run again: the same bytes") for line in lines)


def test_nothing_is_opened_in_shared_memory(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small or unwritable /dev/shm, as in containers, does not matter."""
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.mkdir", "os.open", "shutil.mkdtemp") and arguments:
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    shard(models / "checkpoint", tmp_path / "ranks", 4, Stages(2))
    convert(models / "ranks", tmp_path / "merged")
    convert(models / "checkpoint", tmp_path / "meta", Target("meta", tp=2))
    watching = False
    assert any(name.endswith("tp0-pp0.safetensors") for name in opened)  # it looked
    assert not [name for name in opened if "/shm" in name]


def write_405b(folder: Path) -> None:
    """Llama 3.1 405B of Hugging Face's and of Meta's: true headers, every tensor a hole."""
    shape = named_size("llama3_1_405b")
    entries = {one.name: Entry(one.name, torch.bfloat16, one.shape) for one in hf_layout(FAMILIES["llama"], shape)}
    files = split({name: entry.bytes for name, entry in entries.items()})
    for path in (folder / "hf", folder / "meta"):
        path.mkdir()
    for name, held in files.items():
        header = header_bytes([entries[each] for each in held], {"format": "pt"})
        with (folder / "hf" / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(entries[each].bytes for each in held))
    write_index(folder / "hf", files, 0)
    (folder / "hf/config.json").write_text(json.dumps(to_hf_config(shape, "bfloat16", 1, 2)))
    manifest.write(folder / "hf", "checkpoint", {}, dict.fromkeys(files))
    (folder / "meta/params.json").write_text(json.dumps(meta_params.to_params(shape, True)))
    for name, tensors in meta_write.layout(shape, 8).items():
        tree = {one.name: torch.empty(one.shape, dtype=torch.bfloat16, device="meta") for one in tensors}
        write_skeleton(folder / "meta" / name, tree)


def test_a_405b_is_planned_from_its_headers(tmp_path: Path) -> None:
    write_405b(tmp_path)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 191  # as it is published
    size, output = 811_706_777_600, tmp_path / "out"  # of 405,853,388,800 parameters in bf16
    uneven = Stages(16, 1, (7, *[8] * 14, 7))
    plans = {
        "hf": plan_convert(tmp_path / "hf", output, Target(dtype=torch.float16)),
        "meta": plan_convert(tmp_path / "meta", output, told=Told(named_size("llama3_1_405b"))),
        "megatron": plan_convert(tmp_path / "hf", output, Target("megatron", tp=8, stages=uneven)),
        "ranks": plan_shard(tmp_path / "hf", output, 8, Stages(9)),
    }
    for name, lines in plans.items():
        assert "1137 tensors, 405,853,388,800 parameters" in lines[0], name
        written = int(re.findall(r"disk: ([\d,]+) bytes needed", lines[-2])[0].replace(",", ""))
        assert size <= written < 1.001 * size  # norms on every rank, padded rows
        assert re.fullmatch(r"time: about 2,0[23]\d s at 0\.4 GB/s", lines[-1])
    routes = [line for line in plans["meta"] if "layers.125.self_attn.q_proj" in line]
    assert len(routes) == 1 and routes[0].count("consolidated.0") == 8
    assert not output.exists()

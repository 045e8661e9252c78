"""The gate of every format: what is written right passes, what is not is found, and then nothing is left."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint import meta_write
from llmpipe.checkpoint.convert import Target
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.source import Slices, TensorSource
from llmpipe.errors import UserError
from llmpipe.export import export as exporter
from llmpipe.export.export import export
from llmpipe.layout import Stages

TARGETS = {
    "hf": Target(),
    "meta": Target("meta", tp=2),
    "mcore": Target("megatron", "mcore", tp=2, stages=Stages(2)),
    "legacy": Target("megatron", "legacy", dtype=torch.float16),
    "epf": Target("megatron", "epf", tp=2),
    "easylm": Target("easylm", dtype=torch.bfloat16),
}
FOREIGN = [name for name in TARGETS if name != "hf"]


class Wrong:
    """A source with something wrong: what a mistaken writer would write of the right one."""

    def __init__(self, source: TensorSource):
        self.source, self.path, self.shape = source, source.path, source.shape
        self.tokenizer_place = source.tokenizer_place

    def keys(self) -> list[str]:
        return self.source.keys()

    def dtype(self, key: str) -> torch.dtype:
        return self.source.dtype(key)

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        return self.source.read(key, slices)

    def blocks(self, key: str) -> None: ...


class BitFlipped(Wrong):
    """The lowest bit that every type keeps of one element."""

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        whole = self.source.read(key)
        if key == "layers.1.mlp.down.weight":
            whole[3, 5] *= 1 + 2**-7
        return whole[slices].clone() if slices else whole


class Swapped(Wrong):
    """Two matrices of the same size."""

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        there = {"layers.0.attention.k.weight": "layers.0.attention.v.weight"}
        there |= {value: key for key, value in there.items()}
        return self.source.read(there.get(key, key), slices)


class OtherTheta(Wrong):
    """All tensors are right, a setting is not: only a forward that reads it can tell."""

    def __init__(self, source: TensorSource):
        super().__init__(source)
        self.shape = replace(source.shape, rope_theta=2e4)


@pytest.fixture
def write_wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Wrong]], None]:
    """Have the writers write something wrong."""
    write = exporter.write

    def wrong(kind: type[Wrong]) -> None:
        monkeypatch.setattr(exporter, "write", lambda mover, *rest: write(Mover(kind(mover.source)), *rest))

    return wrong


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_passes(run: Path, tmp_path: Path, name: str) -> None:
    export(run, tmp_path / "out", TARGETS[name])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "check.json").read_text())["checks"]}
    assert all(row["verdict"] == "pass" for row in rows.values())
    assert rows["tensors that differ"]["detail"] == "21 tensors, bit for bit"
    assert rows["copies that differ"]["detail"].startswith("5 tensors of other ranks' files")  # norms: 2 and 3 a stage
    assert 0 <= rows["largest logit difference"]["value"] <= 1e-4


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_bit_is_found(run: Path, tmp_path: Path, name: str, write_wrong) -> None:
    write_wrong(BitFlipped)
    with pytest.raises(UserError) as raised:
        export(run, tmp_path / "out", TARGETS[name])
    assert str(raised.value).startswith(
        f"the round trip differs: the export read back is not {run / 'weights'}, first at layers.1.mlp.down.weight;"
        " nothing was exported"
    )
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", TARGETS)
def test_two_swapped_tensors_are_found(run: Path, tmp_path: Path, name: str, write_wrong) -> None:
    write_wrong(Swapped)
    with pytest.raises(UserError, match=r"first at layers\.0\.attention\.k\.weight; .*largest logit difference"):
        export(run, tmp_path / "out", TARGETS[name])


@pytest.mark.parametrize("name", FOREIGN)
def test_another_setting_is_found(run: Path, tmp_path: Path, name: str, write_wrong) -> None:
    write_wrong(OtherTheta)
    with pytest.raises(UserError, match=r"rope.theta"):
        export(run, tmp_path / "out", TARGETS[name])
    assert not list(tmp_path.glob("*out*"))


def test_a_mistake_that_reader_and_writer_share_is_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """q and k in the wrong rotary order, in the one layout that both use: only the format's own forward can tell."""
    rows = meta_write.head_rows
    monkeypatch.setattr(meta_write, "head_rows", lambda *given, interleaved: rows(*given, interleaved=not interleaved))
    with pytest.raises(UserError, match=r"first at layer 0 .*Failed: largest logit difference \S+ \(limit 0\.0001\)"):
        export(run, tmp_path / "out", TARGETS["meta"])


def test_a_blocks_own_error_does_not_decide(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells where to look once a limit is exceeded; two correct blocks in fp32 are never quite equal."""
    monkeypatch.setattr("llmpipe.verify.compare.LOCATE", 0.0)
    export(run, tmp_path / "out", TARGETS["meta"])


def test_another_setting_of_config_json_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(monkeypatch, "config.json", lambda config: config["rope_parameters"].update(rope_theta=2e4))
    with pytest.raises(UserError, match=r"first at rope theta: 20000, the source has 10000; .*largest logit"):
        export(run, tmp_path / "out")


def test_another_tokenizer_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(monkeypatch, "tokenizer.json", lambda made: made["normalizer"]["normalizers"].append({"type": "Lowercase"}))
    with pytest.raises(UserError, match=r"first at tokenizer: 'Hello world': transformers \[.*\], SentencePiece \["):
        export(run, tmp_path / "out")


def edit(monkeypatch: pytest.MonkeyPatch, file: str, change: Callable) -> None:
    """Let a change be made to a written JSON file before the gate."""
    write = exporter.write

    def written(mover: Mover, directory: Path, target: Target) -> dict[str, str | None]:
        hashes = write(mover, directory, target)
        content = json.loads((directory / file).read_text())
        change(content)
        (directory / file).write_text(json.dumps(content))
        return hashes

    monkeypatch.setattr(exporter, "write", written)


def test_ranks_that_trained_apart_are_found(run: Path, tmp_path: Path) -> None:
    """A norm is in each tensor-parallel rank's file; reading one of them alone would hide the others'."""
    path = run / "weights" / "tp1-pp0.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors["layers.0.mlp_norm.weight"][3] += 1
    save_file(tensors, path, metadata)
    with pytest.raises(
        UserError, match=r"first at layers\.0\.mlp_norm\.weight in tp1-pp0\.safetensors and tp0-pp0\.safetensors;"
    ):
        export(run, tmp_path / "out", TARGETS["meta"])

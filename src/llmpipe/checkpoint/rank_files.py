"""Rank files: one safetensors file for each tensor and pipeline rank, with exactly the bytes that this rank holds.

- `tp0-pp1.safetensors` holds the tensors of tp rank 0 on pipeline rank 1
- keys are our names with global layer numbers (`layers.3.attention.q.weight`)
- each tensor is the slice that `Tensor.slices` says; the vocabulary's true rows, the last rank may hold fewer
- the header's metadata: {"tp": "2", "pp": "2", "rank": "tp0-pp1", "checkpoint": digest, "format": "pt"}; "vp": "2" with
  virtual stages, "layers": "15,17" with an uneven split
- an embedding that is also the head is on the first and on the last pipeline rank
- beside them config.json, the tokenizer's files and manifest.json, which names the checkpoint's digest
"""

from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.blocks import FileSource
from llmpipe.checkpoint.carried import carried_files, copy_hashed
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.hf import safetensors_segments
from llmpipe.checkpoint.layouts import Stored, blocks_of, piece
from llmpipe.checkpoint.mover import Filled, Mover, write_files
from llmpipe.checkpoint.source import TensorSource, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config
from llmpipe.files import read_json
from llmpipe.layout import Stages
from llmpipe.progress import progress


def file_name(tp_rank: int, pp_rank: int) -> str:
    """The name of a rank's file."""
    return f"tp{tp_rank}-pp{pp_rank}.safetensors"


def layout(shape: Shape, tp: int, stages: Stages) -> dict[str, list[Stored]]:
    """What each rank's file holds; UserError if the model cannot be split so."""
    shape.check_split(tp, stages)
    family = FAMILIES[shape.family]
    return {
        file_name(t, p): [
            piece(key, key, row.slices(shape, tp, t)) for key, row in family.keys(shape, stages, p).items()
        ]
        for p in range(stages.pp)
        for t in range(tp)
    }


def targets(source: TensorSource, tp: int, stages: Stages) -> dict[str, list[Filled]]:
    """The ranks' files and the tensors of each, in their stored types."""
    files = layout(source.shape, tp, stages)
    return {name: [Filled(one, source.dtype(one.name)) for one in tensors] for name, tensors in files.items()}


def write(mover: Mover, directory: Path, tp: int, stages: Stages) -> manifest.Manifest:
    """Split a checkpoint, or rank files of another layout, into finished rank files."""
    source = mover.source
    digest = checkpoint_digest(source.path)
    files = targets(source, tp, stages)
    with progress("shard", sum(tensor.bytes for tensors in files.values() for tensor in tensors), "B") as shown:
        segments = {
            directory / name: safetensors_segments(tensors, _metadata(tp, stages, name, {"checkpoint": digest}))
            for name, tensors in files.items()
        }
        hashes = write_files(mover, segments, shown)
    return finish(directory, source.path, "rank_files", {"path": str(source.path), "checkpoint": digest}, hashes)


def write_rank(
    directory: Path,
    tp: int,
    stages: Stages,
    tp_rank: int,
    pp_rank: int,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
) -> str:
    """Write one rank's own tensors, by our names with global layer numbers; returns the file's SHA-256.

    `metadata` is what stands in the header beside the layout: {"checkpoint": digest}.
    """
    entries = [safetensors_file.Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    path = directory / file_name(tp_rank, pp_rank)
    header = _metadata(tp, stages, path.name, metadata)
    return safetensors_file.write_file(path, entries, lambda key: tensors[key].detach().cpu(), header)


def finish(
    directory: Path, carried_from: Path, kind: str, source: dict[str, Any], known_hashes: dict[str, str | None]
) -> manifest.Manifest:
    """Copy the files that go along with the weights, then write the manifest: the directory is whole."""
    hashes = carried_files(carried_from, directory)
    hashes["config.json"] = copy_hashed(carried_from / "config.json", directory / "config.json")
    return manifest.write(directory, kind, source, hashes | known_hashes)


def checkpoint_digest(path: Path) -> str:
    """The digest of the checkpoint whose tensors lie here: for rank files, of what they were made of."""
    found = manifest.read(path)
    if found.kind != "rank_files":
        return found.digest
    if not isinstance(digest := found.source.get("checkpoint"), str):
        raise UserError(f"{path / manifest.NAME} does not say the checkpoint's digest: shard the checkpoint again")
    return digest


def _metadata(tp: int, stages: Stages, name: str, more: dict[str, str]) -> dict[str, str]:
    virtual = {"vp": str(stages.vp)} if stages.vp > 1 else {}
    uneven = {"layers": ",".join(map(str, stages.layers))} if stages.layers else {}
    rank = name.removesuffix(".safetensors")
    return more | {"tp": str(tp), "pp": str(stages.pp), "rank": rank} | virtual | uneven | {"format": "pt"}


def read_layout(path: Path) -> tuple[int, Stages]:
    """tp and the stages that the header of a rank's file says."""
    _, metadata = safetensors_file.read_header(path)
    try:
        layers = tuple(map(int, metadata["layers"].split(","))) if "layers" in metadata else ()
        return int(metadata["tp"]), Stages(int(metadata["pp"]), int(metadata.get("vp", 1)), layers)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} does not say its layout in its header: shard the checkpoint again") from error


class RankFilesSource(FileSource):
    """The rank files of any layout, read as the whole tensors that they are slices of."""

    def __init__(self, path: Path):
        config = path / "config.json"
        shape = from_hf_config(read_json(config, "shard the checkpoint again"), str(config))
        super().__init__(path, shape, FAMILIES[shape.family].keys(shape))
        self.tp, self.stages = read_layout(path / file_name(0, 0))
        self._checkpoint = safetensors_file.read_header(path / file_name(0, 0))[1].get("checkpoint")
        self._regions: set[tuple[str, str]] = set()
        for name, tensors in layout(shape, self.tp, self.stages).items():
            self._add_file(path / name, tensors)
        self.check_covered()

    def _add_file(self, path: Path, tensors: list[Stored]) -> None:
        """The file's slices and nothing else; copies of a slice are read once."""
        self._check_rank(path)
        held, metadata = safetensors_file.read_header(path)
        check_tensors(path, {one.name: one.shape for one in tensors}, {name: t.shape for name, t in held.items()})
        if metadata.get("checkpoint") != self._checkpoint:
            raise UserError(
                f"{path} is of the checkpoint {metadata.get('checkpoint')}, but {file_name(0, 0)} beside it is of"
                f" {self._checkpoint}: shard the checkpoint again"
            )
        for one in tensors:
            found = [block for _, block in blocks_of(one, held[one.name])]
            region = (one.name, str([(part.rows, part.cols) for part in one.parts]))
            for block in found:
                self.add(one.name, block, held[one.name].dtype)
            if region in self._regions:
                del self.blocks_by_key[one.name][-len(found) :]
            self._regions.add(region)

    def _check_rank(self, path: Path) -> None:
        """The file is there, of this layout, and of the rank that its name says."""
        if not path.is_file():
            count = self.tp * self.stages.pp
            raise UserError(
                f"{path} is missing: tp{self.tp}-{self.stages.name} is {count} files: shard the checkpoint again"
            )
        tp, stages = read_layout(path)
        if (tp, stages) != (self.tp, self.stages):
            raise UserError(
                f"{path} is of tp{tp}-{stages.name}, but {file_name(0, 0)} beside it is of"
                f" tp{self.tp}-{self.stages.name}: shard the checkpoint again"
            )
        rank = safetensors_file.read_header(path)[1].get("rank", path.stem)
        if rank != path.stem:
            raise UserError(f"{path} is the file of rank {rank} under another's name: shard the checkpoint again")

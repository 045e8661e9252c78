"""Rank files: one safetensors file for each tensor and pipeline rank, with exactly the bytes that this rank holds.

- `tp0-pp1.safetensors` holds the tensors of tp rank 0 on pipeline stage 1
- keys are our names with global layer numbers (`layers.3.attention.q.weight`)
- each tensor is the slice that `Tensor.slices` says; the vocabulary's true rows, the last rank may hold fewer
- the header's metadata: {"tp": "2", "pp": "2", "checkpoint": digest, "format": "pt"}
- beside them config.json, the tokenizer's files and manifest.json, which names the checkpoint's digest
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmpipe.checkpoint import manifest, stream
from llmpipe.checkpoint.carried import carried_files, copy_hashed
from llmpipe.checkpoint.source import Slices, TensorSource, check_tensors, overlap, resolved, sizes_of
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, from_hf_config
from llmpipe.files import read_json
from llmpipe.layout import Stages
from llmpipe.progress import progress


def file_name(tp_rank: int, pp_rank: int) -> str:
    """The name of a rank's file."""
    return f"tp{tp_rank}-pp{pp_rank}.safetensors"


def write(source: TensorSource, directory: Path, tp: int, pp: int) -> manifest.Manifest:
    """Split a checkpoint, or rank files of another layout, into finished rank files of tp x pp."""
    shape, family = source.shape, FAMILIES[source.shape.family]
    shape.check_split(tp, Stages(pp))
    digest = checkpoint_digest(source.path)
    metadata = _metadata(tp, pp, digest)
    files = {
        (t, p): {key: tensor.slices(shape, tp, t) for key, tensor in family.keys(shape, Stages(pp), p).items()}
        for p in range(pp)
        for t in range(tp)
    }
    entries = {
        rank: [stream.Entry(key, source.dtype(key), sizes_of(slices)) for key, slices in table.items()]
        for rank, table in files.items()
    }
    hashes = {}
    with progress("shard", sum(entry.bytes for rank in entries.values() for entry in rank), "B") as shown:
        for rank, table in files.items():
            name = file_name(*rank)
            hashes[name] = stream.write_file(
                directory / name, entries[rank], lambda key, table=table: source.read(key, table[key]), metadata, shown
            )
    return finish(directory, source.path, "rank_files", {"path": str(source.path), "checkpoint": digest}, hashes)


def write_rank(
    directory: Path,
    layout_tp: int,
    layout_pp: int,
    tp_rank: int,
    pp_rank: int,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
) -> str:
    """Write one rank's own tensors, by our names with global layer numbers; returns the file's SHA-256.

    `metadata` is what stands in the header beside the layout: {"checkpoint": digest}.
    """
    entries = [stream.Entry(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()]
    header = metadata | {"tp": str(layout_tp), "pp": str(layout_pp), "format": "pt"}
    path = directory / file_name(tp_rank, pp_rank)
    return stream.write_file(path, entries, lambda key: tensors[key].detach().cpu(), header)


def finish(
    directory: Path, carried_from: Path, kind: str, source: dict[str, Any], known_hashes: dict[str, str]
) -> manifest.Manifest:
    """Copy the files that go along with the weights, then write the manifest: the directory is whole."""
    hashes = carried_files(carried_from, directory)
    hashes["config.json"] = copy_hashed(carried_from / "config.json", directory / "config.json")
    return manifest.write(directory, kind, source, hashes | known_hashes)


def checkpoint_digest(path: Path) -> str:
    """The digest of the checkpoint whose tensors lie here: for rank files, of what they were made of."""
    found = manifest.read(path)
    return found.source["checkpoint"] if found.kind == "rank_files" else found.digest


def _metadata(tp: int, pp: int, digest: str) -> dict[str, str]:
    return {"tp": str(tp), "pp": str(pp), "checkpoint": digest, "format": "pt"}


class RankFilesSource:
    """The rank files of any layout, read as the whole tensors that they are slices of."""

    def __init__(self, path: Path):
        self.path = path
        config = path / "config.json"
        self.shape = from_hf_config(read_json(config, "shard the checkpoint again"), str(config))
        self._family = FAMILIES[self.shape.family]
        self._table = self._family.keys(self.shape)
        _, metadata = stream.read_header(path / file_name(0, 0))
        try:
            self.tp, self.pp = int(metadata["tp"]), int(metadata["pp"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{path / file_name(0, 0)} does not say its layout in its header: shard the checkpoint again"
            ) from error
        self._dtypes: dict[str, torch.dtype] = {}
        self._stage: dict[str, int] = {}
        for stage in range(self.pp):
            self._check_stage(stage)
        self._open: dict[str, Any] = {}

    def _check_stage(self, stage: int) -> None:
        """Every file of a stage is there, of this layout, with its slices and nothing else."""
        table = self._family.keys(self.shape, Stages(self.pp), stage)
        self._stage |= dict.fromkeys(table, stage)
        for rank in range(self.tp):
            path = self.path / file_name(rank, stage)
            if not path.is_file():
                raise UserError(
                    f"{path} is missing: tp {self.tp} x pp {self.pp} is"
                    f" {self.tp * self.pp} files: shard the checkpoint again"
                )
            entries, metadata = stream.read_header(path)
            if (metadata.get("tp"), metadata.get("pp")) != (str(self.tp), str(self.pp)):
                raise UserError(
                    f"{path} is of tp {metadata.get('tp')} x pp {metadata.get('pp')}, but {file_name(0, 0)} beside it"
                    f" is of tp {self.tp} x pp {self.pp}: shard the checkpoint again"
                )
            expected = {key: sizes_of(t.slices(self.shape, self.tp, rank)) for key, t in table.items()}
            check_tensors(path, expected, {name: entry.shape for name, entry in entries.items()})
            self._dtypes |= {name: entry.dtype for name, entry in entries.items()}

    def keys(self) -> list[str]:
        return list(self._table)

    def dtype(self, key: str) -> torch.dtype:
        return self._dtypes[key]

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        tensor = self._table[key]
        wanted = resolved(slices, tensor.shape(self.shape))
        whole = torch.empty(sizes_of(wanted), dtype=self._dtypes[key])
        read: set[tuple[tuple[int, int], ...]] = set()
        for rank in range(self.tp):
            region = tensor.slices(self.shape, self.tp, rank)
            bounds = tuple((part.start, part.stop) for part in region)
            common = overlap(region, wanted)
            if common is None or bounds in read:  # ranks that hold the same rows: the first is read
                continue
            read.add(bounds)
            inside, target = common
            whole[target] = self._view(rank, key)[inside]
        return whole

    def _view(self, rank: int, key: str) -> Any:
        name = file_name(rank, self._stage[key])
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name].get_slice(key)

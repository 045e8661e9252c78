"""Whole directories: any source → any format, checkpoint → rank files, rank files → checkpoint or another layout."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from llmpipe.checkpoint import carried, easylm, grow, hf, manifest, meta_write, rank_files, tokenizer_files
from llmpipe.checkpoint.changes import UNCHANGED, Changes
from llmpipe.checkpoint.formats import NOTHING, Told, detect, open_source, told_of
from llmpipe.checkpoint.megatron import write as megatron
from llmpipe.checkpoint.megatron.dialects import named
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.origin import check_all_sums, origin, to_hash
from llmpipe.checkpoint.plan import Planned, plan
from llmpipe.checkpoint.source import TensorSource
from llmpipe.checkpoint.torch_write import tensors_to_fill
from llmpipe.errors import UserError
from llmpipe.families import ONE_STAGE
from llmpipe.files import atomic_directory
from llmpipe.hashing import FileHashes
from llmpipe.layout import Stages

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOATING = (*DTYPES.values(), torch.float64)


@dataclass(frozen=True, slots=True)
class Target:
    """What to write."""

    to: Literal["hf", "meta", "megatron", "easylm"] = "hf"
    dialect: str = "mcore"
    """Of a Megatron directory."""
    tp: int = 1
    """Files of Meta's; tensor-parallel ranks of Megatron's."""
    stages: Stages = ONE_STAGE
    """Pipeline ranks of Megatron's."""
    dtype: torch.dtype | None = None
    """None keeps each tensor's stored type."""

    def __post_init__(self) -> None:
        if self.to in ("hf", "easylm") and self.tp > 1:
            raise UserError(f"--to {self.to} is not split: leave out --tp, or split the checkpoint with llmpipe shard")
        if self.to != "megatron" and self.stages != ONE_STAGE:
            raise UserError(f"--to {self.to} has no pipeline stages: leave out --pp, --vp and --pp-layers")


CHECKPOINT = Target()


def convert(
    path: Path,
    output: Path,
    target: Target = CHECKPOINT,
    told: Told = NOTHING,
    hashed: bool = True,
    allow_nonfinite: bool = False,
    changes: Changes = UNCHANGED,
) -> manifest.Manifest:
    """Make a checkpoint, or a directory in another format, of any source."""
    source = _opened(path, told, target, changes)
    check_output(path, output)
    kind, read = "checkpoint" if target.to == "hf" else target.to, to_hash(path) if hashed else []
    with atomic_directory(output) as part, FileHashes(read) as sources, ThreadPoolExecutor(1) as beside:
        intact = beside.submit(check_all_sums, path) if hashed else None
        hashes = write(Mover(source, hashed, allow_nonfinite, sources), part, target)
        hashes |= grow.add_to_files(part, changes.tokens) if changes.tokens else {}
        came_from = origin(path, detect(path), sources.results() if hashed else None)
        if intact:
            intact.result()
        return manifest.write(
            part, kind, came_from | told_of(path, told).described() | changes.described(source), hashes
        )


def _opened(path: Path, told: Told, target: Target, changes: Changes) -> TensorSource:
    """The source with its changes; UserError for what cannot be converted."""
    if changes.tokens and target.to != "hf":
        raise UserError(f"--to {target.to} takes no --add-token: make a checkpoint first, then convert that one")
    source = open_source(path, told)
    check_floating(source)
    return changes.apply(source, written_type(source, target))


def written_type(source: TensorSource, target: Target) -> torch.dtype | None:
    """The one type that every tensor gets; None where each keeps its own. Megatron's files are of one type."""
    return target.dtype or (source.dtype("embedding.weight") if target.to == "megatron" else None)


def write(mover: Mover, directory: Path, target: Target) -> dict[str, str | None]:
    """Fill a directory with a source in a format, all but its manifest; returns the SHA-256 taken while writing."""
    if target.to == "meta":
        return meta_write.write(mover, directory, target.tp, target.dtype)
    if target.to == "megatron":
        hashes: dict[str, str | None] = {**tokenizer_files.carry(mover.source, directory)}
        dialect = named(target.dialect)
        return hashes | megatron.write(mover, directory, dialect, target.tp, target.stages, target.dtype)
    if target.to == "easylm":
        return easylm.write(mover, directory, target.dtype)
    return hf.write(mover, directory, target.dtype)


def plan_convert(
    path: Path, output: Path, target: Target = CHECKPOINT, told: Told = NOTHING, changes: Changes = UNCHANGED
) -> list[str]:
    """What `convert` would read and write, in lines."""
    source = _opened(path, told, target, changes)
    check_output(path, output)
    files = planned(source, target)
    to_hash(path)  # a manifest that contradicts the files
    with TemporaryDirectory() as scratch:
        others = _beside(source, Path(scratch), target, changes)
    return plan(source, detect(path), output, files, [*others, manifest.NAME])


def _beside(source: TensorSource, scratch: Path, target: Target, changes: Changes) -> list[str]:
    """The files beside the weights, made in a directory of their own: what they contradict, the real run would."""
    if target.to == "hf":
        hf.write_beside(source, scratch, target.dtype)
        if changes.tokens:
            grow.add_to_files(scratch, changes.tokens)
    else:
        tokenizer_files.carry(source, scratch)
    more = {"meta": ["params.json"], "easylm": [easylm.METADATA]}.get(target.to, [])
    return [*(str(file.relative_to(scratch)) for file in scratch.rglob("*") if file.is_file()), *more]


def planned(source: TensorSource, target: Target) -> Planned:
    """Each weight file that would be written, with its tensors."""
    if target.to == "meta":
        return meta_write.targets(source, target.tp, target.dtype)
    if target.to == "megatron":
        dtype = target.dtype or source.dtype("embedding.weight")
        trees = megatron.targets(source.shape, named(target.dialect), dtype, target.tp, target.stages)
        return {name: list(tensors_to_fill(tree).values()) for name, tree in trees.items()}
    return easylm.targets(source, target.dtype) if target.to == "easylm" else hf.targets(source, target.dtype)


def shard(
    path: Path, output: Path, tp: int, stages: Stages, hashed: bool = True, allow_nonfinite: bool = False
) -> manifest.Manifest:
    """Make rank files of a checkpoint or of other rank files, for tp ranks and these pipeline stages."""
    source = open_source(path)
    check_output(path, output)
    made_of = manifest.read(path)
    read = manifest.to_hash(path, made_of) if hashed else []
    with atomic_directory(output) as part, FileHashes(read) as sources:
        made = rank_files.write(Mover(source, hashed, allow_nonfinite, sources), part, tp, stages)
        manifest.compare(path, made_of, sources.results())
        return made


def plan_shard(path: Path, output: Path, tp: int, stages: Stages) -> list[str]:
    """What `shard` would read and write, in lines."""
    source = open_source(path)
    check_output(path, output)
    manifest.to_hash(path, manifest.read(path))
    others = [*carried.names(path), "config.json", manifest.NAME]
    return plan(source, detect(path), output, rank_files.targets(source, tp, stages), others)


def merge(path: Path, output: Path) -> manifest.Manifest:
    """Make a checkpoint of rank files of any layout."""
    if detect(path) != "rank_files":
        raise UserError(
            f"{path} holds no rank files (tp0-pp0.safetensors): llmpipe convert makes a checkpoint of other weights"
        )
    return convert(path, output)


def check_floating(source: TensorSource) -> None:
    """UserError for quantized weights."""
    other = [f"{key} is {source.dtype(key)}" for key in source.keys() if source.dtype(key) not in FLOATING]  # noqa: SIM118
    if other:
        raise UserError(f"{source.path} holds quantized weights, {other[0]}: take the weights in bf16, fp16 or fp32")


def check_output(path: Path, output: Path) -> None:
    """UserError if writing `output` would take away the source or a directory that llmpipe did not make."""
    if path.resolve() == output.resolve() or output.resolve() in path.resolve().parents:
        raise UserError(f"--output {output} holds the source {path} and would replace it: name another directory")
    if path.resolve() in output.resolve().parents:
        raise UserError(f"--output {output} lies inside the source {path}, which is left as it is: name another place")
    manifest.check_replaceable(output)

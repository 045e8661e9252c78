"""Whole directories: any source → checkpoint, checkpoint → rank files, rank files → checkpoint or another layout."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint import carried, hf, manifest, rank_files, tokenizer_files
from llmpipe.checkpoint.formats import detect, open_source
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.plan import plan
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.files import atomic_directory, sha256
from llmpipe.layout import Stages

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(
    path: Path,
    output: Path,
    dtype: torch.dtype | None = None,
    expected: Shape | None = None,
    hashed: bool = True,
    allow_nonfinite: bool = False,
) -> manifest.Manifest:
    """Make a checkpoint of any source; `dtype` None keeps the stored types, `expected` is checked against it."""
    source = open_source(path, expected)
    check_floating(source)
    check_output(path, output)
    with atomic_directory(output) as part, ThreadPoolExecutor(1) as beside:
        came_from = beside.submit(origin, path, hashed)  # its hashes are taken while the bytes are in the page cache
        hashes = hf.write(Mover(source, hashed, allow_nonfinite), part, dtype)
        return manifest.write(part, "checkpoint", came_from.result(), hashes)


def plan_convert(
    path: Path, output: Path, dtype: torch.dtype | None = None, expected: Shape | None = None
) -> list[str]:
    """What `convert` would read and write, in lines."""
    source = open_source(path, expected)
    check_floating(source)
    tokenizer = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"] if tokenizer_files.find(path) else []
    others = [*{*carried.names(path), *tokenizer, "config.json", manifest.NAME}]
    return plan(source, detect(path), output, hf.targets(source, dtype), others)


def shard(
    path: Path, output: Path, tp: int, stages: Stages, hashed: bool = True, allow_nonfinite: bool = False
) -> manifest.Manifest:
    """Make rank files of a checkpoint or of other rank files, for tp ranks and these pipeline stages."""
    source = open_source(path)
    check_output(path, output)
    with atomic_directory(output) as part:
        return rank_files.write(Mover(source, hashed, allow_nonfinite), part, tp, stages)


def merge(path: Path, output: Path) -> manifest.Manifest:
    """Make a checkpoint of rank files of any layout."""
    if detect(path) != "rank_files":
        raise UserError(
            f"{path} holds no rank files (tp0-pp0.safetensors): llmpipe convert makes a checkpoint of other weights"
        )
    return convert(path, output)


def check_floating(source: TensorSource) -> None:
    """UserError for quantized weights."""
    whole = [f"{key} is {source.dtype(key)}" for key in source.keys() if not source.dtype(key).is_floating_point]  # noqa: SIM118
    if whole:
        raise UserError(f"{source.path} holds quantized weights, {whole[0]}: take the weights in bf16, fp16 or fp32")


def check_output(path: Path, output: Path) -> None:
    """UserError if writing `output` would take away the source or a directory that llmpipe did not make."""
    if path.resolve() == output.resolve() or output.resolve() in path.resolve().parents:
        raise UserError(f"--output {output} holds the source {path} and would replace it: name another directory")
    if output.is_dir() and not (output / manifest.NAME).is_file():
        found = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith("."))
        if found:
            raise UserError(
                f"--output {output} holds {', '.join(found[:4])} and no {manifest.NAME}: llmpipe did not make it"
                " and does not replace it: name another directory or remove it"
            )


def origin(path: Path, hashed: bool = True) -> dict[str, Any]:
    """A source for the manifest: by its own manifest's digest, or by the SHA-256 of what was read."""
    kind = detect(path)
    if (path / manifest.NAME).is_file():
        return {"path": str(path), "format": kind, "digest": manifest.read(path).digest}
    files = weight_files(path)
    if not hashed:
        return {"path": str(path), "format": kind, "bytes": {str(f.relative_to(path)): f.stat().st_size for f in files}}
    return {"path": str(path), "format": kind, "files": {str(file.relative_to(path)): sha256(file) for file in files}}


def weight_files(path: Path) -> list[Path]:
    """The files of a foreign source that say what its weights are."""
    patterns = (
        "params.json", "consolidated.*.pth", "config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin",
        "latest_checkpointed_iteration.txt", "**/model_optim_rng.pt", "**/model_rng.pt", "**/*.distcp", "**/.metadata",
        "**/common.pt", "streaming_*", "*.msgpack", "*.pkl",
    )  # fmt: skip
    return sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})

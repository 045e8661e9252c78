"""Whole directories: any source → checkpoint, checkpoint → rank files, rank files → checkpoint or another layout."""

import math
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint import carried, hf, manifest, rank_files, tokenizer_files
from llmpipe.checkpoint.formats import detect, open_source
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape
from llmpipe.files import atomic_directory, sha256
from llmpipe.progress import progress

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(
    path: Path, output: Path, dtype: torch.dtype | None = None, expected: Shape | None = None
) -> manifest.Manifest:
    """Make a checkpoint of any source; `dtype` None keeps the stored types, `expected` is checked against it."""
    source = open_source(path, expected)
    whole = [f"{key} is {source.dtype(key)}" for key in source.keys() if not source.dtype(key).is_floating_point]  # noqa: SIM118
    if whole:
        raise UserError(f"{path} holds quantized weights, {whole[0]}: take the weights in bf16, fp16 or fp32")
    check_output(path, output)
    with atomic_directory(output) as part:
        hashes = hf.write(source, part, dtype)
        return manifest.write(part, "checkpoint", origin(path), hashes)


def shard(path: Path, output: Path, tp: int, pp: int) -> manifest.Manifest:
    """Make rank files of tp x pp of a checkpoint or of other rank files."""
    source = open_source(path)
    check_output(path, output)
    with atomic_directory(output) as part:
        return rank_files.write(source, part, tp, pp)


def merge(path: Path, output: Path) -> manifest.Manifest:
    """Make a checkpoint of rank files of any layout."""
    if detect(path) != "rank_files":
        raise UserError(
            f"{path} holds no rank files (tp0-pp0.safetensors): llmpipe convert makes a checkpoint of other weights"
        )
    return convert(path, output)


def plan(path: Path, output: Path, dtype: torch.dtype | None = None, expected: Shape | None = None) -> list[str]:
    """What `convert` would read and write, in lines."""
    source = open_source(path, expected)
    tensors = FAMILIES[source.shape.family].keys(source.shape)
    sizes = {key: math.prod(tensor.shape(source.shape)) for key, tensor in tensors.items()}
    read = sum(count * source.dtype(key).itemsize for key, count in sizes.items())
    written = sum(count * (dtype or source.dtype(key)).itemsize for key, count in sizes.items())
    stored = ", ".join(sorted({str(source.dtype(key)).removeprefix("torch.") for key in sizes}))
    tokenizer = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"] if tokenizer_files.find(path) else []
    names = {*carried.names(path), *tokenizer, "config.json", manifest.NAME}
    shape = [f"  {name}: {getattr(source.shape, name)}" for name in Shape.__dataclass_fields__]
    return [
        f"would read {path} ({detect(path)}): {len(sizes)} tensors, {sum(sizes.values()):,} parameters, {stored},"
        f" {read:,} bytes",
        *shape,
        f"would write {output}: {', '.join(sorted(names))}, and safetensors of {written:,} bytes",
    ]


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


def origin(path: Path) -> dict[str, Any]:
    """A source for the manifest: by its own manifest's digest, or by the SHA-256 of what was read."""
    kind = detect(path)
    if (path / manifest.NAME).is_file():
        return {"path": str(path), "format": kind, "digest": manifest.read(path).digest}
    patterns = (
        ("params.json", "consolidated.*.pth") if kind == "meta" else ("config.json", "*.safetensors", "*.index.json")
    )
    files = sorted(file for pattern in patterns for file in path.glob(pattern))
    with progress("hash the source", sum(file.stat().st_size for file in files), "B") as shown:
        hashes = {}
        for file in files:
            hashes[file.name] = sha256(file)
            shown.add(file.stat().st_size, file.name)
    return {"path": str(path), "format": kind, "files": hashes}

"""Files of torch.save made of a source's tensors: holes first, then the bytes in place, then the checksums."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.containers.torch_skeleton import seal, write_skeleton
from llmpipe.checkpoint.mover import Filled, Mover
from llmpipe.progress import Progress

_THREADS = 4


def write_torch_files(
    mover: Mover, directory: Path, trees: dict[str, Any], shown: Progress | None = None
) -> dict[str, str | None]:
    """Write files by their path below a directory, dealt to threads; their SHA-256, None if the mover takes none.

    Each tree is of dicts and what torch.save takes, with a Filled for each tensor that is to come from the source.
    """
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(trees))) as pool:
        written = {
            name: pool.submit(write_torch_file, mover, directory / name, tree, shown) for name, tree in trees.items()
        }
        try:
            return {name: done.result() for name, done in written.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_torch_file(mover: Mover, path: Path, tree: Any, shown: Progress | None = None) -> str | None:
    """Write one file; returns its SHA-256. It is not atomic by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    places = write_skeleton(path, _with_holes(tree))
    holes = {places[name].offset: filled for name, filled in tensors_to_fill(tree).items()}
    seal(path, mover.fill(path, holes, shown))
    return mover.sources.of(path) if mover.hashed else None


def tensors_to_fill(tree: Any, prefix: str = "") -> dict[str, Filled]:
    """Every Filled of nested dicts by its dotted path, as `torch_file.tensors` names what it reads."""
    if isinstance(tree, Filled):
        return {prefix: tree}
    if not isinstance(tree, dict):
        return {}
    return {
        name: filled
        for key, child in tree.items()
        for name, filled in tensors_to_fill(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _with_holes(tree: Any) -> Any:
    if isinstance(tree, Filled):
        return torch.empty(tree.stored.shape, dtype=tree.dtype, device="meta")
    return {key: _with_holes(child) for key, child in tree.items()} if isinstance(tree, dict) else tree

"""Megatron's rank files, opened for the plain forward: which tensors each rank holds, under global layer numbers.

    ROOT/latest_checkpointed_iteration.txt                       "release", or a number
    ROOT/{release,iter_0000100}/mp_rank_TT[_PPP]/model_optim_rng.pt (with a distributed optimizer: model_rng.pt)

Layers are numbered within their stage, and with virtual stages within `model0`, `model1`, ...: chunk 0 of every stage
comes before chunk 1 of any.
"""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.containers.inert import StandIn
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import read_torch_file
from llmpipe.errors import UserError

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_dp_000)?")  # _dp: alibaba's --distributed-checkpointing
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class RankFiles:
    """All ranks of one iteration; only their pickles are read, tensors are mapped when they are asked for."""

    def __init__(self, path: Path):
        self.directory = iteration_of(path)
        files = _rank_files(self.directory)
        self.tp = max(tp for tp, _ in files) + 1
        self.pp = max(pp for _, pp in files) + 1
        missing = [(tp, pp) for tp in range(self.tp) for pp in range(self.pp) if (tp, pp) not in files]
        if missing:
            raise UserError(
                f"{self.directory} lacks the files of rank tp{missing[0][0]}-pp{missing[0][1]}: {len(missing)} of"
                f" {self.tp} x {self.pp} ranks are missing: copy all of them"
            )
        trees = {rank: read_torch_file(file, stand_ins=True) for rank, file in files.items()}
        self.args = arguments_of(trees[0, 0].get("args"))
        if (version := float(trees[0, 0].get("checkpoint_version", 0))) < 2:
            raise UserError(
                f"{self.directory} is of checkpoint_version {version:g}, expected 2 or later (older ones have the rows"
                " of query_key_value in another order): let Megatron load and save it"
            )
        self.tensors: dict[str, list[StoredTensor]] = {}
        """Key, without "model.", to the tensors of the ranks of a stage that hold it, in rank order."""
        self._number_layers(trees)
        self._maps = Maps()

    def read(self, key: str, rows: slice = slice(None)) -> list[torch.Tensor]:
        """A tensor, or rows of it, of every TP rank, mapped into memory."""
        return [self._maps.tensor(stored)[rows] for stored in self.tensors[key]]

    def _number_layers(self, trees: dict[tuple[int, int], Any]) -> None:
        """Collect the tensors of all ranks; a layer's number counts on through the chunks and stages before."""
        chunks = [name for name in trees[0, 0] if re.fullmatch(r"model\d*", name)]
        before = 0
        for chunk in sorted(chunks, key=lambda name: int(name[5:] or 0)):
            for pp in range(self.pp):
                held = [_flat(trees[tp, pp].get(chunk, {}), "") for tp in range(self.tp)]
                if any(ranks.keys() != held[0].keys() for ranks in held):
                    raise UserError(f"{self.directory}: the TP ranks of stage {pp} do not hold the same tensors")
                for key in held[0]:
                    if (shifted := _shifted(key, before)) in self.tensors:
                        raise UserError(f"{self.directory}: stage {pp} holds {key}, which another stage holds, too")
                    self.tensors[shifted] = [ranks[key] for ranks in held]
                before += 1 + max((int(found[1]) for found in map(_LAYER.search, held[0]) if found), default=-1)
        if not self.tensors:
            raise UserError(f"{self.directory} holds no tensors under 'model': it is no checkpoint of Megatron's")


class Maps:
    """Files mapped into memory once, and stored tensors as views of them."""

    def __init__(self) -> None:
        self._files: dict[Path, torch.Tensor] = {}

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        file = stored.file
        if file not in self._files:
            self._files[file] = torch.from_file(str(file), False, file.stat().st_size, dtype=torch.uint8)
        spans = [(size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True)]
        raw = self._files[file][stored.offset : stored.offset + (sum(spans) + 1) * stored.dtype.itemsize]
        raw = raw if stored.offset % stored.dtype.itemsize == 0 else raw.clone()
        return raw.view(stored.dtype).as_strided(stored.shape, stored.strides)


def is_megatron(path: Path) -> bool:
    """Whether rank files of Megatron's lie here, or in the iteration that the tracker names."""
    return (path / "latest_checkpointed_iteration.txt").is_file() or holds_a_model(path)


def holds_a_model(folder: Path) -> bool:
    """Whether the ranks' folders lie here, or torch.distributed.checkpoint's metadata."""
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*"))


def iteration_of(path: Path) -> Path:
    """The folder that holds the model: the one that is named, or the one that its tracker names."""
    if holds_a_model(path):
        return path
    tracker = path / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise UserError(f"{path} has neither mp_rank_* nor latest_checkpointed_iteration.txt: name Megatron's folder")
    word = tracker.read_text().strip()
    if word != "release" and not word.isdigit():
        raise UserError(f"{tracker} says {word[:40]!r}, expected 'release' or a number")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not holds_a_model(folder):
        raise UserError(f"{tracker} says {word}, but {folder} holds no mp_rank_*: copy it, or mend the tracker")
    return folder


def _rank_files(directory: Path) -> dict[tuple[int, int], Path]:
    """(tp, pp) to the file that holds the model; folders of optimizer states alone are passed over."""
    files: dict[tuple[int, int], Path] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        found = _RANK.fullmatch(folder.name)
        held = [folder / name for name in ("model_optim_rng.pt", "model_rng.pt") if (folder / name).is_file()]
        if found and held:
            files[int(found[1]), int(found[2] or 0)] = held[0]
    if not files:
        raise UserError(f"{directory}: no mp_rank_* holds model_optim_rng.pt or model_rng.pt: copy the rank files")
    return files


def arguments_of(args: Any) -> dict[str, Any]:
    """The training arguments; empty where a converter wrote none."""
    if isinstance(args, Namespace):
        return vars(args)
    if isinstance(args, StandIn) and isinstance(args.state, dict):  # types.SimpleNamespace
        return args.state
    return {}


def _flat(tree: Any, prefix: str) -> dict[str, StoredTensor]:
    """Nested dictionaries as one, keys joined by dots; what is no tensor (extra states) is left out."""
    if isinstance(tree, StoredTensor):
        return {prefix.removesuffix("."): tree}
    found: dict[str, StoredTensor] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found |= _flat(value, f"{prefix}{key}.")
    return found


def _shifted(key: str, before: int) -> str:
    return _LAYER.sub(lambda found: f"layers.{int(found[1]) + before}.", key, count=1)

"""Which files of a Megatron directory hold which rank: root, release or iter_NNNNNNN, mp_rank_TT[_PPP]."""

import re
from itertools import islice
from pathlib import Path

from llmpipe.checkpoint.containers import distcp
from llmpipe.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
FILES = ("model_optim_rng.pt", "model_rng.pt")
"""A rank's file; the second is Megatron-LLM's with a distributed optimizer, whose states have folders of their own."""
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_dp_0+)?")
_OPTIMIZER = re.compile(r"mp_rank_\d{2,}(_\d{3,})*_(dp_)?\d{3,}")
_FOLDER = re.compile(r"release|iter_\d{7,}")
_AGAIN = "copy or download all of the checkpoint"


def is_megatron(path: Path) -> bool:
    """Whether a directory looks like one of Megatron's, at its root or inside."""
    if (path / TRACKER).is_file() or is_torch_dist(path):
        return True
    return any(_RANK.fullmatch(entry.name) and entry.is_dir() for entry in path.glob("mp_rank_*"))


def is_torch_dist(folder: Path) -> bool:
    """Whether it is an iteration's folder in torch_dist, Megatron-LM's default."""
    return (folder / distcp.METADATA).is_file() and (folder / "metadata.json").is_file()


def iteration_folder(path: Path) -> Path:
    """The folder with the ranks, which is given itself or named in the root's latest_checkpointed_iteration.txt."""
    if is_torch_dist(path) or any(path.glob("mp_rank_*")):
        return path
    if not (path / TRACKER).is_file():
        found = sorted(entry.name for entry in path.iterdir() if _FOLDER.fullmatch(entry.name))
        raise UserError(
            f"{path / TRACKER} is missing, so that none of {', '.join(found) or 'its entries'} is the one meant: name"
            " the folder itself"
        )
    text = (path / TRACKER).read_text(errors="replace").strip()
    number = f"iter_{int(text):07d}" if re.fullmatch(r"\d{1,18}", text) else "none"
    folder = path / ("release" if text == "release" else number)
    if not folder.is_dir():
        raise UserError(f"{path / TRACKER} says {text[:40]!r}, but {folder.name} is no folder beside it: {_AGAIN}")
    return folder


def rank_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The file of each (tp, pp) rank; UserError if one is missing, or there twice, or the names are of two layouts."""
    found: dict[tuple[int, int], Path] = {}
    staged = set()
    for entry in sorted(entry for entry in folder.glob("mp_rank_*") if entry.is_dir()):
        files = [entry / name for name in FILES if (entry / name).is_file()]
        match = _RANK.fullmatch(entry.name)
        if match is None or not files:
            _check_optimizer(entry, bool(files))
            continue
        rank = int(match[1]), int(match[2] or 0)
        if len(files) > 1 or rank in found:
            raise UserError(f"{folder} holds tp {rank[0]}, pp {rank[1]} twice: {', '.join(map(str, files))}: {_AGAIN}")
        found[rank] = files[0]
        staged.add(match[2] is not None)
    if len(staged) > 1:
        raise UserError(
            f"{folder} holds folders with and without a pipeline rank, which are of two checkpoints: {_AGAIN}"
        )
    _check_grid(folder, found)
    return found


def _check_optimizer(entry: Path, holds_model: bool) -> None:
    """A folder that is no rank's may hold an optimizer's state."""
    if holds_model and entry.name.count("_") > 3:
        raise UserError(f"{entry} is of an expert-parallel model: llmpipe reads dense models")
    if not _OPTIMIZER.fullmatch(entry.name) or holds_model:
        raise UserError(f"{entry} holds no {' or '.join(FILES)}: {_AGAIN}")


def _check_grid(folder: Path, found: dict[tuple[int, int], Path]) -> None:
    if not found:
        raise UserError(f"{folder} holds no mp_rank_TT[_PPP]/{FILES[0]}: {_AGAIN}")
    tp, pp = (max(rank[which] for rank in found) + 1 for which in (0, 1))
    missing = ((t, p) for p in range(pp) for t in range(tp) if (t, p) not in found)
    if len(found) < tp * pp:
        listed = ", ".join(f"tp {t}, pp {p}" for t, p in islice(missing, 8))
        raise UserError(f"{folder} has files of tp {tp} x pp {pp} ranks, but not of {listed}: {_AGAIN}")

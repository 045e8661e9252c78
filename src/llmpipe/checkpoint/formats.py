"""The formats of weights: told from the files that lie there, and opened."""

from pathlib import Path

from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.meta import MetaSource
from llmpipe.checkpoint.rank_files import RankFilesSource
from llmpipe.checkpoint.source import TensorSource, check_expected
from llmpipe.errors import UserError
from llmpipe.families import Shape


def detect(path: Path) -> str:
    """meta, hf or rank_files; UserError that says what lies there and what may."""
    may = (
        "a directory of Meta's (params.json, consolidated.*.pth), of Hugging Face's (config.json, *.safetensors),"
        " or of rank files (tp0-pp0.safetensors)"
    )
    if not path.exists():
        raise UserError(f"{path} is missing: there may stand {may}")
    if not path.is_dir():
        raise UserError(f"{path} is a file: there may stand {may}")
    if (path / "tp0-pp0.safetensors").is_file():
        return "rank_files"
    if (path / "params.json").is_file() or any(path.glob("consolidated.*.pth")):
        return "meta"
    weights = (*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin"))
    if (path / "config.json").is_file() and weights:
        return "hf"
    found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    listed = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") if found else "nothing"
    raise UserError(f"{path} holds no weights that llmpipe reads: {listed} found; there may stand {may}")


def open_source(path: Path, expected: Shape | None = None) -> TensorSource:
    """Open a checkpoint of any format; `expected` is checked against what the source says of itself."""
    kind = detect(path)
    if kind == "meta":
        return MetaSource(path, expected)
    source = HfSource(path) if kind == "hf" else RankFilesSource(path)
    if expected:
        check_expected(source.shape, expected, path)
    return source

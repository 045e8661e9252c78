"""The formats of weights: told from the files that lie there, and opened."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import hf_weights
from llmpipe.checkpoint.easylm import EasyLMSource
from llmpipe.checkpoint.easylm_files import split_prefix, weights_file
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.megatron.directory import is_megatron
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.meta import MetaSource
from llmpipe.checkpoint.rank_files import RankFilesSource
from llmpipe.checkpoint.source import OtherShape, TensorSource, check_expected
from llmpipe.errors import UserError
from llmpipe.families import Shape, from_hf_config
from llmpipe.files import read_json

MAY = (
    "a directory of Hugging Face's (config.json, *.safetensors or pytorch_model*.bin), of Meta's or Mistral's own"
    " (params.json, consolidated.*), of Megatron's (latest_checkpointed_iteration.txt, or mp_rank_* folders), of"
    " EasyLM's (streaming_params or a flax file), or of rank files (tp0-pp0.safetensors)"
)


@dataclass(frozen=True, slots=True)
class Told:
    """What the user says of a source beyond its files: it settles what these leave in doubt, and is checked."""

    shape: Shape | None = None
    dialect: str | None = None
    """Of a Megatron directory."""
    vocab: int | None = None
    """The vocabulary's true rows, of a Megatron directory."""

    def described(self) -> dict[str, Any]:
        """For the manifest, where verification finds it: what was said, nothing else."""
        shape = {"shape": asdict(self.shape)} if self.shape else {}
        said = {"dialect": self.dialect, "vocab": self.vocab} | shape
        return {"told": {name: value for name, value in said.items() if value}} if self != NOTHING else {}


NOTHING = Told()
_HUGGING_FACE = ("hf", "rank_files")


def detect(path: Path) -> str:
    """hf, meta, megatron, easylm or rank_files; UserError that says what lies there and what may."""
    plain = split_prefix(path)[1]
    if not plain.exists():
        raise UserError(f"{path} is missing: there may stand {MAY}")
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path} is a file: there may stand {MAY}" if not plain.is_dir() else _nothing(path))
    return kind


def kind_of(path: Path) -> str | None:
    """hf, meta, megatron, easylm or rank_files; None if it is none. UserError where that is in doubt."""
    plain = split_prefix(path)[1]
    if weights_file(plain) is not None:
        return "easylm"
    if not plain.is_dir():
        return None
    if (path / "tp0-pp0.safetensors").is_file():
        return "rank_files"
    if (path / "config.json").is_file() and hf_weights.holds_weights(path):
        return "hf"  # Mistral's repositories hold its own params.json and weights beside
    if (path / "params.json").is_file() or any(path.glob("consolidated.*")):
        return "meta"
    return "megatron" if is_megatron(path) else None


def _nothing(path: Path) -> str:
    """What lies there instead of weights, and what to do about it where that can be told."""
    found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if "adapter_config.json" in found:
        return (
            f"{path} holds an adapter, not a model: name the weights that it was trained on, and with --adapter {path}"
            " it is merged into them"
        )
    if hf_weights.holds_weights(path):
        return f"{path / 'config.json'} is missing beside weights in Hugging Face's format: copy or download it, too"
    listed = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "") if found else "nothing"
    folders = [path / name for name in found] + sorted(path.glob("snapshots/*"))  # of the hub's cache
    inside = [str(folder) for folder in folders if folder.is_dir() and kind_of(folder)]
    hint = f"; weights lie in {', '.join(inside[:4])}" if inside else ""
    return f"{path} holds no weights that llmpipe reads: {listed} found{hint}; there may stand {MAY}"


def open_source(path: Path, told: Told = NOTHING) -> TensorSource:
    """Open a checkpoint of any format; what is told is checked against what the source says of itself.

    A config.json beside another format's weights counts as told, too.
    """
    kind = detect(path)
    if (told.dialect or told.vocab) and kind != "megatron":
        raise UserError(f"{path} is no Megatron directory ({kind}): --source-dialect and --vocab do not apply to it")
    if kind in _HUGGING_FACE:
        source = HfSource(path) if kind == "hf" else RankFilesSource(path)
        if told.shape:
            check_expected(source.shape, told.shape, path)
        return source
    try:
        return _open_foreign(path, kind, told_of(path, told))
    except OtherShape as error:
        config = _folder(path) / "config.json"
        if told.shape or not config.is_file():
            raise
        raise UserError(
            f"{config} lies beside weights of another shape: {error.different} there: correct it, or take it away"
        ) from error


def told_of(path: Path, told: Told = NOTHING) -> Told:
    """What is told of a source by the user, and by a config.json beside weights that are not Hugging Face's."""
    config = _folder(path) / "config.json"
    if detect(path) in _HUGGING_FACE or not config.is_file():
        return told
    said = from_hf_config(read_json(config, "copy it again, or take it away"), str(config))
    if told.shape:
        check_expected(said, told.shape, config)
    return replace(told, shape=said)


def _folder(path: Path) -> Path:
    plain = split_prefix(path)[1]
    return plain if plain.is_dir() else plain.parent


def _open_foreign(path: Path, kind: str, told: Told) -> TensorSource:
    if kind == "meta":
        return MetaSource(path, told.shape)
    if kind == "megatron":
        return MegatronSource(path, told.shape, told.dialect, told.vocab)
    return EasyLMSource(path, told.shape)

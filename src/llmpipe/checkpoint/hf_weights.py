"""Which files of a Hugging Face directory make the model; what else lies there is left alone, and said.

safetensors go before pytorch_model.bin. In either, an index says which files belong together; without one it is the
file of the plain name, or the only one. Directories hold more than that: Mistral's own consolidated.safetensors, an
adapter, a trainer's states, other frameworks' weights, Meta's files in original/.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from llmpipe.checkpoint.carried import check_pulled
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import read_torch_file, tensors
from llmpipe.errors import UserError
from llmpipe.files import read_json

log = logging.getLogger(__name__)

BIN_INDEX = "pytorch_model.bin.index.json"
# The index, the name of a file that is alone, and the names of all.
_KINDS = (
    (safetensors_file.INDEX, "model.safetensors", "*.safetensors"),
    (BIN_INDEX, "pytorch_model.bin", "pytorch_model*.bin"),
)
_NOT_THE_MODEL = ("consolidated", "adapter_model")
_NUMBERED = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files that make the model."""

    files: dict[str, list[str] | None]
    """Each with the tensors that the index gives it; None without an index."""
    index: str | None = None


def holds_weights(directory: Path) -> bool:
    """Whether there are files that may make a model in Hugging Face's format."""
    return any((directory / index).is_file() or _names(directory, pattern) for index, _, pattern in _KINDS)


def weight_files(directory: Path) -> Chosen:
    """The files with a directory's weights; UserError if there are none, or two whole sets of one format."""
    for index, single, pattern in _KINDS:
        found = _names(directory, pattern)
        if (directory / index).is_file():
            return _indexed(directory, index, single if single in found else None)
        parts = [name for name in found if _NUMBERED.fullmatch(name)]
        if len(found) == 1 or (single in found and not parts):
            return Chosen({single if single in found else found[0]: None})
        if found:
            raise UserError(
                f"{directory} holds {', '.join(found[:8])} and no {index} that says which of them make the model: take"
                " the others away, or put the index there"
            )
    raise UserError(f"{directory} holds no *.safetensors and no pytorch_model.bin: copy or download the weights")


def _names(directory: Path, pattern: str) -> list[str]:
    """The files of one format, sorted; links that lead nowhere count, so that they are named."""
    files = sorted(path for path in directory.glob(pattern) if not path.is_dir())
    return [path.name for path in files if not path.name.startswith(_NOT_THE_MODEL)]


def _indexed(directory: Path, index: str, single: str | None) -> Chosen:
    """The files that an index names; `single` where these are missing, as in an index that was left behind."""
    files = _read_index(directory / index)
    if single is None or single in files:
        return Chosen(dict(files), index)
    missing = [name for name in files if not (directory / name).exists()]
    if missing:
        log.warning("%s names %s, which is missing: %s is taken", directory / index, missing[0], single)
        return Chosen({single: None})
    raise UserError(
        f"{directory} holds the model twice, as {single} and as the {len(files)} files of {index}: take one away"
    )


def _read_index(path: Path) -> dict[str, list[str]]:
    index = read_json(path, safetensors_file.GET_AGAIN)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{path} has no weight_map: copy or download it again")
    files: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: {name} is in {file!r}, which is no file beside it: {safetensors_file.GET_AGAIN}")
        files.setdefault(file, []).append(name)
    return files


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by the checkpoint's names; the index has to agree with the files."""
    found: dict[str, StoredTensor] = {}
    chosen = weight_files(directory)
    for file, listed in chosen.files.items():
        path = directory / file
        if not path.is_file():
            raise UserError(f"{path} is missing, but the index of {directory} lists it: copy or download it again")
        check_pulled(path)
        held = (
            safetensors_file.read_header(path)[0] if path.suffix == ".safetensors" else tensors(read_torch_file(path))
        )
        if listed is not None and set(listed) != set(held):
            unlike = sorted(set(listed) ^ set(held))
            raise UserError(
                f"{path} and the index of {directory} disagree on {', '.join(unlike[:8])}: copy or download both again"
            )
        found |= held
    _say_what_is_left(directory, chosen)
    return found


def _say_what_is_left(directory: Path, chosen: Chosen) -> None:
    """One line on the other weights that lie there, in folders too."""
    beside = {path.name for path in directory.iterdir() if path.suffix in _WEIGHTS or path.name == BIN_INDEX}
    folders = {f"{path.parent.name}/" for path in directory.glob("*/*") if path.suffix in _WEIGHTS}
    if left := sorted(beside - {*chosen.files, chosen.index}) + sorted(folders):
        taken = ", ".join(sorted(chosen.files)[:4]) + (" ..." if len(chosen.files) > 4 else "")
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        log.info("%s: %s taken; left alone: %s%s", directory, taken, ", ".join(left[:8]), more)

"""The files of a LoRA adapter in PEFT's format: what adapter_config.json says, and which tensors belong to what."""

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmpipe.checkpoint.blocks import same_bytes
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import read_torch_file, tensors
from llmpipe.errors import UserError
from llmpipe.files import read_json, sha256

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# What changes nothing in a merge: it chose the modules, the start or the training. fan_in_fan_out is of Conv1D alone,
# which no family here has; PEFT itself sets it to false for nn.Linear. With ensure_weight_tying the head's tensors are
# there beside the embedding's, and equal.
_NEUTRAL = frozenset((
    "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
))  # fmt: skip
_READ = frozenset(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"))
# Other starts change the weights that the adapter is to be added to.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_TWICE = re.compile(r"(?P<module>.+?)(?P<base>\.original_module)?\.(?P<kind>weight|bias)")
_OWN = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.(?P<kind>weight|bias)")


@dataclass(frozen=True, slots=True)
class Delta:
    """What is added to a stored tensor: scaling * left @ right."""

    left: StoredTensor
    """(out, r): lora_B, or an embedding's lora_embedding_A transposed."""
    right: StoredTensor
    """(r, in)."""
    scaling: float
    magnitude: StoredTensor | None = None
    """(out, 1), DoRA's: the norms that the sum's rows are brought to."""

    @property
    def rank(self) -> int:
        return self.right.shape[0]


@dataclass(slots=True)
class Adapter:
    """An adapter's tensors by the names of Hugging Face's tensors that they change."""

    path: Path
    config: dict[str, Any]
    file: Path
    deltas: dict[str, Delta] = field(default_factory=dict)
    replaced: dict[str, StoredTensor] = field(default_factory=dict)
    """Tensors trained whole: modules_to_save, biases, resized embeddings."""

    @property
    def names(self) -> set[str]:
        return {*self.deltas, *self.replaced}

    def described(self) -> dict[str, Any]:
        """For a manifest."""
        files = {path.name: sha256(path) for path in (self.path / CONFIG, self.file)}
        base = {key: self.config.get(key) for key in ("base_model_name_or_path", "revision")}
        return {"path": str(self.path.resolve()), **base, "files": files}


def read_adapter(path: Path) -> Adapter:
    """An adapter's directory; each of its tensors is in the result once. UserError with what it has beyond."""
    config = read_json(path / CONFIG, "expected is a directory that PEFT's save_pretrained made")
    _check_config(config, path / CONFIG)
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path} holds none of {', '.join(FILES)}: copy or download the adapter again")
    found = safetensors_file.read_header(file)[0] if file.suffix == ".safetensors" else tensors(read_torch_file(file))
    if other := [name for name, tensor in found.items() if not tensor.dtype.is_floating_point]:
        raise UserError(
            f"{file}: {other[0]} is {found[other[0]].dtype}, expected floating-point numbers: copy it again"
        )
    adapter, factors, left_over = Adapter(path, config, file), dict[str, dict[str, StoredTensor]](), []
    for name, tensor in found.items():
        if _stands_twice(name, found):
            continue
        plain = name.removeprefix(_PREFIX)
        if plain != name and (match := _FACTOR.fullmatch(plain)):
            factors.setdefault(match["module"], {})[match["kind"]] = tensor
        elif (
            plain != name and (match := _OWN.fullmatch(plain)) and "lora_" not in plain and "token_adapter" not in plain
        ):
            target = f"{match['module']}.{match['kind']}"
            left_over += [name] if target in adapter.replaced else []
            adapter.replaced[target] = tensor
        else:
            left_over.append(name)
    adapter.deltas = {f"{module}.weight": _delta(module, held, adapter) for module, held in factors.items()}
    if left_over:
        raise UserError(
            f"{file}: {len(left_over)} tensors belong to nothing that llmpipe merges: {', '.join(left_over[:20])}:"
            " merge it with PEFT's own merge_and_unload"
        )
    if not adapter.names:
        raise UserError(f"{file} holds no tensors: copy or download the adapter again")
    return adapter


def _stands_twice(name: str, found: dict[str, StoredTensor]) -> bool:
    """Whether PEFT wrote a tensor only besides the trained one, as its save_embedding_layers=True does.

    That is what modules_to_save left of the base, `original_module`, and the trained one once more by its plain name.
    """
    match = _TWICE.fullmatch(name)
    if match is None:
        return False
    names = [
        f"{match['module']}.{trained}.{match['kind']}" for trained in ("modules_to_save", "modules_to_save.default")
    ]
    if match["base"]:
        return any(trained in found for trained in (*names, f"{match['module']}.{match['kind']}"))
    return any(same_bytes(found[name], found.get(trained)) for trained in names)


def _check_config(config: Any, path: Path) -> None:
    """UserError for another kind of adapter, or settings that a merge would lose."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, expected 'LORA': merge it with PEFT's own merge_and_unload")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {start!r}, which also changed the weights that it was trained on: convert"
            " the adapter to a plain one with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    lost = [f"{key}: {value!r}" for key, value in config.items() if value and key not in _NEUTRAL | _READ]
    if lost:
        raise UserError(f"{path}: llmpipe does not merge {', '.join(lost)}: merge it with PEFT's own merge_and_unload")
    told = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(patterns := config.get(name) or {}, dict) or not all(map(_is_pattern, patterns)):
            raise UserError(f"{path}: {name} is {patterns!r}, no table of patterns: copy the adapter again")
        told |= {f"{name}[{pattern!r}]": value for pattern, value in patterns.items()}
    for key, value in told.items():
        number = int if key.startswith("r") else (int, float)  # ranks are whole, alphas need not be
        if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UserError(f"{path}: {key} is {value!r}, expected a number above 0: copy the adapter again")


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False


def _delta(module: str, held: dict[str, StoredTensor], adapter: Adapter) -> Delta:
    magnitude = held.pop("lora_magnitude_vector", None)
    if held.keys() == {"lora_A", "lora_B"}:
        left, right = held["lora_B"], held["lora_A"]
    elif held.keys() == {"lora_embedding_A", "lora_embedding_B"} and magnitude is None:
        left, right = (_transposed(held[f"lora_embedding_{which}"]) for which in "AB")
    else:
        found = [*held, *(["lora_magnitude_vector"] if magnitude else [])]
        raise UserError(f"{adapter.file}: {module} has {', '.join(found)}, expected lora_A and lora_B: copy it again")
    rank = _matching(adapter.config.get("rank_pattern"), module, adapter.config["r"])
    if not (len(left.shape) == len(right.shape) == 2 and left.shape[1] == right.shape[0] == rank):
        raise UserError(
            f"{adapter.file}: {module} has factors of {list(left.shape)} and {list(right.shape)}, but {CONFIG} says"
            f" rank {rank}: copy both again"
        )
    if magnitude is not None:
        if bool(adapter.config.get("use_dora")) is False or math.prod(magnitude.shape) != left.shape[0]:
            raise UserError(f"{adapter.file}: {module}.lora_magnitude_vector does not fit {CONFIG}: copy both again")
        magnitude = replace(magnitude, shape=(left.shape[0], 1), strides=(1, 1))
    elif adapter.config.get("use_dora"):
        raise UserError(f"{adapter.file}: {CONFIG} says use_dora, but {module} has no magnitudes: copy both again")
    alpha = _matching(adapter.config.get("alpha_pattern"), module, adapter.config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    return Delta(left, right, scaling, magnitude)


def _matching(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT looks it up."""
    values = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(values, default)


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[::-1], strides=tensor.strides[::-1])

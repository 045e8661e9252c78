"""EasyLM's files: which one holds the weights, and metadata.pkl, whose llama_config is all that says the shape.

Its trainer writes {"step", "variant", "flags", "llama_config"}; its converters write none.
"""

import logging
import pickle
from pathlib import Path
from typing import Any

from llmpipe.checkpoint.containers.inert_names import find
from llmpipe.checkpoint.containers.msgpack_file import looks_like_msgpack
from llmpipe.checkpoint.containers.torch_file import read_inert
from llmpipe.errors import UserError
from llmpipe.families import Shape, from_hf_config
from llmpipe.files import read_json

log = logging.getLogger(__name__)

WEIGHTS, STATE, METADATA = "streaming_params", "streaming_train_state", "metadata.pkl"
_NAMES = (WEIGHTS, STATE)
_OTHERS = (".safetensors", ".pth", ".bin", ".distcp")
# Fields of Shape and llama_config's keys for them; older versions had no KV heads, no theta, and max_sequence_length.
_CONFIG = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_PICKLE_BYTES = 1 << 24


def weights_file(path: Path) -> Path | None:
    """The file with the weights: `path` itself, or the one in the directory; None if there is none.

    Beside another format's weights only EasyLM's own names count: Hugging Face's directories may hold a flax_model.
    UserError if there are several files, none of which is the latest params or train state.
    """
    if path.is_file():
        return path if looks_like_msgpack(path) else None
    if not path.is_dir():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file())
    others = any(file.suffix in _OTHERS for file in files)
    found = [file for file in files if looks_like_msgpack(file) and not (others and not file.name.startswith(_NAMES))]
    latest = [file for file in found if file.name in _NAMES] or found
    if len(latest) > 1:
        raise UserError(f"{path} holds {', '.join(file.name for file in latest)}: name the file that you want")
    return latest[0] if latest else None


def split_prefix(path: Path) -> tuple[str | None, Path]:
    """EasyLM's own way to name a checkpoint, `params::/path`, as its kind and the path."""
    kind, colons, rest = str(path).partition("::")
    if not colons:
        return None, path
    if kind not in ("params", "flax_params", "trainstate", "trainstate_params"):
        raise UserError(f"{path}: {kind!r} is none of EasyLM's params, flax_params, trainstate and trainstate_params")
    return kind, Path(rest)


def metadata_of(file: Path) -> Path:
    """metadata.pkl, or that of a milestone."""
    return file.with_name(METADATA if file.name in _NAMES else f"metadata_{file.name.rpartition('_')[2]}.pkl")


def read_shape(file: Path) -> Shape | None:
    """What metadata.pkl beside the weights, or else Hugging Face's config.json, says; None without either."""
    for metadata in dict.fromkeys((metadata_of(file), file.with_name(METADATA))):
        if metadata.is_file():
            return _shape_of(metadata)
    config = file.with_name("config.json")
    return from_hf_config(read_json(config, "copy it again"), str(config)) if config.is_file() else None


def _shape_of(metadata: Path) -> Shape:
    if metadata.stat().st_size > _PICKLE_BYTES:
        raise UserError(f"{metadata} has {metadata.stat().st_size:,} bytes: it is no metadata.pkl of EasyLM's")
    found = read_inert(metadata.read_bytes(), metadata, find({}, True))
    config = found.get("llama_config") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"{metadata} holds no llama_config: remove it, and name the shape with --shape")
    older = {"rope_theta": 1e4, "num_key_value_heads": config.get("num_attention_heads")}
    older["max_position_embeddings"] = config.get("max_sequence_length")
    said: dict[str, Any] = {
        field: config.get(key) if config.get(key) is not None else older.get(key) for field, key in _CONFIG.items()
    }
    try:
        shape = Shape(family="llama", head_dim=said["hidden"] // said["num_heads"], **said)
    except (TypeError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{metadata}: {error}: name the shape with --shape and remove it") from error
    if shape.rope_theta != 1e4 and found.get("step"):
        log.warning(
            "%s says rope_theta %g, which is carried; EasyLM's own training and serving compute with 10000, so weights"
            " that EasyLM trained need a shape with rope_theta 10000", metadata, shape.rope_theta,
        )  # fmt: skip
    return shape


def metadata_bytes(shape: Shape) -> bytes:
    """metadata.pkl of plain values, as EasyLM's trainer writes it before its first step."""
    if shape.rope_theta != 1e4:
        log.warning("EasyLM computes with rope_theta 10000, whatever it is told; this model has %g", shape.rope_theta)
    config = {key: getattr(shape, field) for field, key in _CONFIG.items()}
    return pickle.dumps({"step": 0, "variant": {}, "flags": {}, "llama_config": config}, protocol=4)

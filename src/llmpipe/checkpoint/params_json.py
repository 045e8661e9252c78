"""params.json, read: Meta's hyper-parameters, and Mistral's own, which has the same names and says a little more.

- dim, n_layers, n_heads, n_kv_heads (absent: n_heads), norm_eps, vocab_size (-1: see the tokenizer)
- Meta's: rope_theta (absent: 10000), use_scaled_rope (Llama 3.1 and 3.2), multiple_of and ffn_dim_multiplier (the MLP's
  size is read from w1)
- Mistral's (github.com/mistralai/mistral-inference, args.py): head_dim and hidden_dim always, sliding_window (v0.1),
  rope_theta (absent in v0.1: 10000)
"""

import logging
from pathlib import Path
from typing import Any

from llmpipe.checkpoint.containers.safetensors_file import GET_AGAIN
from llmpipe.errors import UserError, nearest
from llmpipe.families import Shape
from llmpipe.files import read_json

log = logging.getLogger(__name__)

_KEYS = {
    "dim", "ffn_dim_multiplier", "head_dim", "hidden_dim", "max_batch_size", "max_position_embeddings", "max_seq_len",
    "multiple_of", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "rope_scaling_factor", "rope_theta",
    "sliding_window", "use_scaled_rope", "vocab_size",
}  # fmt: skip
# Neither says it and no arithmetic depends on it: Llama 2's and Mistral 7B's, unless the shape is named.
_MAX_POSITIONS = {"llama": 4096, "mistral": 32768}
_SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Llama 3.1's and 3.2's params.json are alike, but 3.2 (1B and 3B, by their width) scales by 32.
_FACTOR, _WIDTHS_OF_32 = 8.0, (2048, 3072)


def read_params(path: Path) -> dict[str, Any]:
    """The table; UserError for a key that would be lost, or one that is missing."""
    params = read_json(path, GET_AGAIN)
    if not isinstance(params, dict):
        raise UserError(f"{path} is no table of keys: copy or download it again")
    params = {key: value for key, value in params.items() if value is not None}
    for key in params:
        if key not in _KEYS:
            raise UserError(f"{path}: the key {key} is unknown and would be lost: {nearest(key, _KEYS)}")
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in params:
            raise UserError(f"{path}: the key {key} is missing: copy or download it again")
    return params


def family_of(params: dict[str, Any], expected: Shape | None) -> str:
    """Which name the arithmetic has: Meta's files may hold a Mistral that llmpipe wrote, Mistral's own are one."""
    if expected and expected.family in _MAX_POSITIONS:
        return expected.family
    return "mistral" if "hidden_dim" in params else "llama"


def read_fields(params: dict[str, Any], expected: Shape | None, path: Path) -> dict[str, Any]:
    """The fields of `Shape` that params.json says, `expected` filling what it leaves open; UserError for doubts."""
    family, window = family_of(params, expected), params.get("sliding_window")
    return {
        "family": family,
        "num_layers": params["n_layers"],
        "hidden": params["dim"],
        "num_heads": params["n_heads"],
        "num_kv_heads": params.get("n_kv_heads", params["n_heads"]),
        "head_dim": params["head_dim"] if "head_dim" in params else params["dim"] // params["n_heads"],
        "max_positions": _positions(params, expected, family, path),
        "norm_eps": float(params["norm_eps"]),
        "rope_theta": _theta(params, expected, path),
        "rope_scaling": _scaling(params, expected, path),
        "window": None if window is None else int(window),  # some files have it as a string
        "tie_embeddings": bool(expected and expected.tie_embeddings),
    }


def _positions(params: dict[str, Any], expected: Shape | None, family: str, path: Path) -> Any:
    said = params.get("max_seq_len", params.get("max_position_embeddings"))
    if said is None and expected is None:
        of = "Llama 2's" if family == "llama" else "Mistral 7B's"
        log.info(
            "%s: params.json does not say the longest sequence: %d, %s, taken", path.parent, _MAX_POSITIONS[family], of
        )
    if said is not None:
        return said
    return expected.max_positions if expected else _MAX_POSITIONS[family]


def _theta(params: dict[str, Any], expected: Shape | None, path: Path) -> float:
    """Where Mistral's files leave it out, code of Mistral's and of transformers disagree, but for windowed models."""
    if "rope_theta" in params or "hidden_dim" not in params or "sliding_window" in params:
        return float(params.get("rope_theta", 1e4))
    if expected is None:
        raise UserError(f"{path} does not say rope_theta: name the model's shape with --shape")
    return expected.rope_theta


def _scaling(params: dict[str, Any], expected: Shape | None, path: Path) -> dict[str, Any] | None:
    """The rope scaling; UserError where Llama 3.1 and 3.2 cannot be told apart."""
    if (scaled := params.get("use_scaled_rope", False)) not in (True, False):
        raise UserError(f"{path}: use_scaled_rope is {scaled!r}, but has to be true or false: copy it again")
    if not scaled:
        return None
    factor = params.get("rope_scaling_factor")
    if factor is None and expected and expected.rope_scaling:
        factor = expected.rope_scaling.get("factor")
    if factor is None and params["dim"] in _WIDTHS_OF_32:
        raise UserError(
            f"{path}: use_scaled_rope does not say the factor, which is 8 in Llama 3.1 and 32 in Llama 3.2:"
            " say which with --shape (llama3_2_1b, llama3_2_3b), or `shape:` in the model's file"
        )
    return _SCALED | {"factor": float(factor or _FACTOR), "original_max_position_embeddings": 8192}

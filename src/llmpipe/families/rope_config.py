"""The rotary settings of config.json: theta and the kinds of scaling, in the keys of transformers 4 and 5."""

import math
from typing import Any

from llmpipe.errors import UserError, nearest
from llmpipe.families.family import Shape

_ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL)
# Each kind's own keys: those that have to be there, and those that may.
KINDS = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), (_ORIGINAL,)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "yarn": (
        ("factor",),
        (_ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}


def read_rope(config: dict[str, Any], where: str) -> dict[str, Any]:
    """`Shape`'s rope_theta and rope_scaling; UserError for a kind or a key that the decoder does not compute."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise UserError(f"{where}: the rope scaling is {settings!r}, no table of keys: copy or download it again")
    settings = dict(settings)
    theta = settings.pop("rope_theta", None) or config.get("rope_theta") or 1e4
    kind = settings.pop("rope_type", None) or settings.get("type", "default")
    settings.pop("type", None)
    if config.get("partial_rotary_factor", 1.0) != 1.0 or settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor: llmpipe turns whole heads only")
    if config.get(_ORIGINAL) is not None:
        settings[_ORIGINAL] = config[_ORIGINAL]  # transformers takes it before the scaling's own
    scaling = None if kind == "default" else checked_scaling({"rope_type": kind} | settings, where)
    if kind == "default" and settings:
        raise UserError(f"{where}: rope settings without a rope_type: {', '.join(settings)}")
    return {"rope_theta": float(theta) if isinstance(theta, int) else theta, "rope_scaling": scaling}


def checked_scaling(scaling: dict[str, Any], where: str) -> dict[str, Any]:
    """A rope scaling with all its kind's keys and no other; UserError otherwise."""
    kind, given = scaling["rope_type"], {key: value for key, value in scaling.items() if value is not None}
    if kind not in KINDS:
        raise UserError(f"{where}: rope scaling {kind!r}: {nearest(str(kind), KINDS)}")
    needed, optional = KINDS[kind]
    missing = [key for key in needed if key not in given]
    unknown = [key for key in given if key not in (*needed, *optional, "rope_type")]
    if missing or unknown:
        raise UserError(
            f"{where}: rope scaling {kind!r} with keys missing: {missing or 'none'}, unknown: {unknown or 'none'}"
        )
    wrong = {key: value for key, value in given.items() if key in needed and not _is_positive(value)}
    if wrong:
        raise UserError(f"{where}: rope scaling {kind!r} with {wrong}, but these have to be numbers above 0")
    return given


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def write_rope(shape: Shape) -> dict[str, Any]:
    """rope_theta and rope_scaling as transformers 4 writes them and 5 still reads them."""
    scaling = {"rope_scaling": dict(shape.rope_scaling)} if shape.rope_scaling else {}
    return {"rope_theta": shape.rope_theta} | scaling

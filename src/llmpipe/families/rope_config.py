"""The rotary settings of config.json: theta and the kinds of scaling, in the keys of transformers 4 and 5."""

import math
from typing import Any

from llmpipe.errors import UserError, nearest
from llmpipe.families.family import Shape

_ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", _ORIGINAL)
# transformers 4's name, which 5 takes first where both are there, and 5's.
_TABLES = ("rope_scaling", "rope_parameters")
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
    settings = _settings(config, where)
    theta = _theta(config, where)
    kind = settings.pop("rope_type", "default")
    if config.get("partial_rotary_factor") not in (None, 1) or settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor: llmpipe turns whole heads only")
    if config.get(_ORIGINAL) is not None:
        settings[_ORIGINAL] = config[_ORIGINAL]  # transformers takes it before the scaling's own
    scaling = None if kind == "default" else checked_scaling({"rope_type": kind} | settings, where)
    if kind == "default" and settings:
        raise UserError(f"{where}: rope settings without a rope_type: {', '.join(settings)}")
    return {"rope_theta": float(theta) if type(theta) is int else theta, "rope_scaling": scaling}


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The scaling's keys but theta's, of rope_scaling or of rope_parameters; UserError if both say different things."""
    found = {}
    for name in _TABLES:
        table = {} if config.get(name) is None else config[name]
        if not isinstance(table, dict):
            raise UserError(f"{where}: {name} is {table!r}, no table of keys: copy or download it again")
        if not table:
            continue
        given = {key: value for key, value in table.items() if value is not None and key not in ("type", "rope_theta")}
        kinds = {str(table[key]) for key in ("rope_type", "type") if table.get(key) is not None}
        if len(kinds) > 1:
            raise UserError(f"{where}: {name} says both {' and '.join(sorted(kinds))}: remove the wrong one")
        found[name] = given | ({"rope_type": kinds.pop()} if kinds else {})
    if len(found) == 2 and _effective(found["rope_scaling"]) != _effective(found["rope_parameters"]):
        raise UserError(
            f"{where}: rope_scaling {config['rope_scaling']} contradicts rope_parameters {config['rope_parameters']}:"
            " remove the one that is not meant"
        )
    return next(iter(found.values()), {})


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    return {"rope_type": "default"} | settings


def _theta(config: dict[str, Any], where: str) -> Any:
    """The base of the frequencies, which may stand in three places; UserError if they differ."""
    places = {"rope_theta": config.get("rope_theta")}
    places |= {f"{name}.rope_theta": (config.get(name) or {}).get("rope_theta") for name in _TABLES}
    said = {place: value for place, value in places.items() if value is not None}
    if len(set(map(str, map(_as_number, said.values())))) > 1:
        listed = ", ".join(f"{place} is {value}" for place, value in said.items())
        raise UserError(f"{where}: {listed}: remove the one that is not meant")
    return next(iter(said.values()), 1e4)


def _as_number(value: Any) -> Any:
    return float(value) if type(value) is int else value


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

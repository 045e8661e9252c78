"""The model families: one small table each, and config.json read into a `Shape` and back."""

from typing import Any

from llmpipe.errors import UserError, nearest
from llmpipe.families.family import Family, Shape, Tensor, generic, layer_of
from llmpipe.families.llama import LLAMA

FAMILIES = {family.name: family for family in (LLAMA,)}

__all__ = [
    "FAMILIES",
    "Family",
    "Shape",
    "Tensor",
    "from_hf_config",
    "generic",
    "layer_of",
    "named_size",
    "to_hf_config",
]

# config.json's keys that are neither sizes nor settings of the arithmetic.
_IGNORED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type",
    "pad_token_id", "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# Settings that the decoder knows in one value only.
_ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}


def named_size(name: str) -> Shape:
    """The row of a family's size table with this name."""
    rows = {row: shape for family in FAMILIES.values() for row, shape in family.sizes.items()}
    if name not in rows:
        raise UserError(f"shape {name!r} is in no family's size table: {nearest(name, rows)}")
    return rows[name]


def from_hf_config(config: dict[str, Any], where: str = "config.json") -> Shape:
    """The shape that a config.json of transformers 4 or 5 describes; UserError for what the decoder would not carry."""
    if not isinstance(config, dict):
        raise UserError(f"{where} is no table of keys: copy or download it again")
    architectures = {family.architecture: family for family in FAMILIES.values()}
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in architectures:
        raise UserError(f"{where}: architecture {architecture!r}: llmpipe knows {', '.join(architectures)}")
    rope = _rope(config, where)
    config = {key: value for key, value in config.items() if key not in _IGNORED and value is not None}
    for key, value in _ONLY.items():
        if config.pop(key, value) != value:
            raise UserError(f"{where}: this version of llmpipe computes with {key} {value!r} only")
    try:
        num_heads, hidden = config.pop("num_attention_heads"), config.pop("hidden_size")
        shape = Shape(
            family=architectures[architecture].name,
            num_layers=config.pop("num_hidden_layers"),
            hidden=hidden,
            num_heads=num_heads,
            num_kv_heads=config.pop("num_key_value_heads", num_heads),
            head_dim=config.pop("head_dim", hidden // num_heads),
            ffn=config.pop("intermediate_size"),
            vocab=config.pop("vocab_size"),
            max_positions=config.pop("max_position_embeddings", 2048),
            norm_eps=config.pop("rms_norm_eps", 1e-6),
            tie_embeddings=config.pop("tie_word_embeddings", False),
            **rope,
        )
    except KeyError as error:
        raise UserError(f"{where}: the key {error.args[0]!r} is missing") from error
    except (TypeError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{where}: {error}: copy or download it again") from error
    if config:
        raise UserError(f"{where}: keys that llmpipe does not know and would lose: {', '.join(sorted(config))}")
    return shape


def _rope(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings, from transformers 5's rope_parameters or the older rope_theta and rope_scaling."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", config.get("rope_theta", 1e4))
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    if kind != "default" or settings:
        raise UserError(
            f"{where}: rope scaling {kind!r} with {settings}: this version of llmpipe computes without scaling only"
        )
    return {"rope_theta": float(theta) if isinstance(theta, int) else theta, "rope_scaling": None}


def to_hf_config(shape: Shape, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json for a shape; `dtype` as torch names it (bfloat16). Old and new readers find their rope keys."""
    family = FAMILIES[shape.family]
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }

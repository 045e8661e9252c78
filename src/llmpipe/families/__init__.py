"""The model families: one small table each, and config.json read into a `Shape` and back."""

from typing import Any

from llmpipe.errors import UserError, nearest
from llmpipe.families.falcon import FALCON
from llmpipe.families.family import ONE_STAGE, Family, Shape, Tensor, generic, layer_of
from llmpipe.families.hf_config import read_config, write_config
from llmpipe.families.llama import LLAMA
from llmpipe.families.mistral import MISTRAL
from llmpipe.families.qwen import QWEN2, QWEN3

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, FALCON)}

__all__ = [
    "FAMILIES",
    "ONE_STAGE",
    "Family",
    "Shape",
    "Tensor",
    "from_hf_config",
    "generic",
    "is_first_form",
    "layer_of",
    "named_size",
    "to_hf_config",
]

# The first config.json files of Falcon and of Llama.
_OLD_ARCHITECTURES = {"RWForCausalLM": "FalconForCausalLM", "LLaMAForCausalLM": "LlamaForCausalLM"}
_OLD_TYPES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}


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
    family = _family(config, where)
    return read_config(family, config, where)


def _family(config: dict[str, Any], where: str) -> Family:
    """By `architectures`; by `model_type`, which is what transformers goes by, in a config that lists none."""
    architectures = {family.architecture: family for family in FAMILIES.values()}
    listed, kind = config.get("architectures"), config.get("model_type")
    kind = _OLD_TYPES.get(str(kind), kind)
    if not listed and str(kind) in FAMILIES:
        return FAMILIES[str(kind)]
    architecture = str(listed[0]) if isinstance(listed, list) and listed else "none"
    family = architectures.get(_OLD_ARCHITECTURES.get(architecture, architecture))
    if family is None:
        raise UserError(f"{where}: architecture {architecture!r}: llmpipe knows {', '.join(architectures)}")
    if kind not in (None, family.name):
        raise UserError(f"{where}: model_type {kind!r} contradicts the architecture {architecture!r}: correct it")
    return family


def is_first_form(config: dict[str, Any]) -> bool:
    """Whether a config.json names classes that transformers does not have, as Falcon's and Llama's first ones do."""
    names = (*(config.get("architectures") or ()), config.get("model_type"))
    return any(name in _OLD_ARCHITECTURES or name in _OLD_TYPES for name in names)


def to_hf_config(shape: Shape, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json for a shape; `dtype` as torch names it (bfloat16). Old and new readers find their rope keys."""
    return write_config(FAMILIES[shape.family], shape, dtype, bos, eos)

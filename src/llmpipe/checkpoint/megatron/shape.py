"""A Megatron checkpoint's shape: from its args, its tensors, and what the caller knows; nothing is a silent default."""

import logging
from argparse import Namespace
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmpipe.checkpoint.megatron.dialect import QKV, Dialect
from llmpipe.checkpoint.megatron.layout import Grid, Place
from llmpipe.checkpoint.megatron.ranks import Found, Opened
from llmpipe.checkpoint.megatron.vocabulary import tokenizer_size, true_vocab
from llmpipe.checkpoint.source import check_expected
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.layout import Stages

log = logging.getLogger(__name__)

# What args say where nobody told them. One `uncertain` field of another value, and all of them were told.
_DEFAULTS = {"rope_theta": 1e4, "rope_scaling": None, "norm_eps": 1e-5}
# Fields that a fork's args may leave open: its models have none of it then, which the log says.
_NONE_OF_IT = ("rope_scaling", "window")


@dataclass(frozen=True, slots=True)
class Known:
    """What reading needs to know of a checkpoint beside its tensors."""

    shape: Shape
    grid: Grid
    layernorm_1p: bool
    """Whether the norms' weights lack 1."""


def read_shape(path: Path, opened: Opened, dialect: Dialect, expected: Shape | None, vocab: int | None) -> Known:
    """The shape, and how it is dealt to ranks; UserError with what is missing, and the option that says it."""
    said = _said(path, dialect, opened.args)
    interleaved = said.pop("interleaved", dialect.interleaved)
    layernorm_1p = said.pop("layernorm_1p", False)
    stages, found = _of_tensors(path, opened, dialect)
    padded, head = found.pop("padded"), found.pop("head_rows")
    found |= said
    found["vocab"] = true_vocab(path, padded, _vocabularies(path, opened, padded, head, said, expected, vocab))
    if expected and vocab is not None:
        expected = replace(expected, vocab=vocab)
    try:
        shape = Shape(**_completed(path, dialect, found, expected))
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: its args say: {error}") from error
    if expected:
        check_expected(shape, expected, path)
    return Known(shape, Grid(opened.tp, stages, padded, interleaved, head), layernorm_1p)


def _said(path: Path, dialect: Dialect, args: Namespace | None) -> dict[str, Any]:
    try:
        return dialect.read_args(args)
    except (UserError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}, read as of {dialect.system} (--source-dialect {dialect.name}): {error}") from error


def _vocabularies(
    path: Path, opened: Opened, padded: int, head: int | None, said: dict[str, Any], expected: Shape | None,
    vocab: int | None,
) -> list[tuple[str, int | None]]:  # fmt: skip
    """Who says how large the true vocabulary is, the surest first."""
    args = said.get("vocab")
    if args == padded and expected:  # some tools write the padded one
        args = None
    known = [
        ("--vocab", vocab),
        ("the args", args),
        ("the head", head if head != padded else None),
        ("the shape", expected.vocab if expected else None),
    ]
    if all(size is None for _, size in known):  # else a tokenizer that is none would not matter
        known.append(("the tokenizer", tokenizer_size(path) or tokenizer_size(opened.folder)))
    return known


def _of_tensors(path: Path, opened: Opened, dialect: Dialect) -> tuple[Stages, dict[str, Any]]:
    """What the tensors themselves show: the stages, fields of `Shape`, "padded" and a whole head's rows."""
    first, last = (opened.places[Place(0, stage)] for stage in (0, opened.pp * opened.vp - 1))
    embedding, head = first.get(dialect.names["embedding.weight"]), last.get(dialect.names["head.weight"])
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path}: {dialect.names['embedding.weight']} is missing on the first rank, or no matrix")
    counts = [_count_layers(opened, dialect, stage) for stage in range(opened.pp * opened.vp)]
    found: dict[str, Any] = {
        "num_layers": sum(counts),
        "hidden": embedding.shape[1],
        "padded": embedding.shape[0] * opened.tp,
        "head_rows": head.shape[0] if head and dialect.whole_head else None,
        "tie_embeddings": head is None,
        "qkv_bias": _in_first_layer(first, dialect, f"{QKV}.bias") is not None,
        "output_bias": _in_first_layer(first, dialect, "layers.{}.attention.o.bias") is not None,
        "mlp_bias": _in_first_layer(first, dialect, "layers.{}.mlp.down.bias") is not None,
        "qk_norm": _in_first_layer(first, dialect, "layers.{}.attention.q_norm.weight") is not None,
    }
    down = _in_first_layer(first, dialect, "layers.{}.mlp.down.weight")
    if down and len(down.shape) == 2:
        found["ffn"] = down.shape[1] * opened.tp
    return Stages(opened.pp, opened.vp, tuple(counts) if len(set(counts)) > 1 else ()), found


def _in_first_layer(tensors: dict[str, Found], dialect: Dialect, key: str) -> Found | None:
    return tensors.get(dialect.names[key].format(0)) if key in dialect.names else None


def _count_layers(opened: Opened, dialect: Dialect, stage: int) -> int:
    stem = dialect.names[f"{QKV}.weight"].partition("{}")[0]
    names = [name for name in opened.places[Place(0, stage)] if name.startswith(stem)]
    count = len({name.removeprefix(stem).partition(".")[0] for name in names})
    if not count:
        raise UserError(f"{opened.folder}: stage {stage} holds no layers: copy or download it again")
    return count


def _completed(path: Path, dialect: Dialect, found: dict[str, Any], expected: Shape | None) -> dict[str, Any]:
    """Every field: what was found, what is expected; UserError for what neither says."""
    found = found | _settled(path, dialect, found, expected)
    found.setdefault("family", expected.family if expected else _family(dialect, found))
    left = [field for field in fields(Shape) if field.name not in found]
    if expected:
        return found | {field.name: getattr(expected, field.name) for field in left}
    missing = [field.name for field in left if field.default is MISSING]
    if missing:
        raise UserError(f"{path} does not say {', '.join(missing)}: name the model's shape with --shape")
    for field in left:
        if field.name in _NONE_OF_IT:
            log.warning("%s does not say %s: none taken; with --shape, what that says", path, field.name)
    return found


def _settled(path: Path, dialect: Dialect, found: dict[str, Any], expected: Shape | None) -> dict[str, Any]:
    """The fields that the args may have left at defaults, all of them: as expected, if that is given."""
    uncertain = {name: found[name] for name in dialect.uncertain if name in found}
    if not uncertain or any(value != _DEFAULTS[name] for name, value in uncertain.items()):
        return {}
    said = ", ".join(f"{name} {value!r}" for name, value in uncertain.items())
    if expected is None:
        log.warning("%s: %s may not have been told, and says: %s; or give --shape", path, dialect.system, said)
        return {}
    settled = {name: getattr(expected, name) for name, value in uncertain.items() if value != getattr(expected, name)}
    if settled:
        log.warning("%s: %s taken, as asked for; its args say %s", path, settled, said)
    return settled


def _family(dialect: Dialect, found: dict[str, Any]) -> str:
    """The family whose arithmetic the fields are."""
    family = "mistral" if found.get("window") else "llama"
    if found.get("qk_norm"):
        family = "qwen3"
    elif found.get("qkv_bias") and not found.get("output_bias"):
        family = "qwen2"
    return family if family in dialect.families else dialect.families[0]

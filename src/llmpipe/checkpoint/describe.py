"""Weights as text for `llmpipe inspect`: of any format, and what a directory with a manifest holds."""

import json
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import adapter_files, manifest, tokenizer_folder
from llmpipe.checkpoint.formats import NOTHING, Told, detect, kind_of, open_source
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.families.family import Shape


def holds_weights(path: Path) -> bool:
    """Whether weights of any format that convert reads lie there; UserError where that is in doubt."""
    return kind_of(path) is not None


def describe(directory: Path, tensors: bool = False, told: Told = NOTHING) -> str:
    """A directory with a manifest: kind, source, digest, the model's shape, its tensors on request, and the files."""
    found = manifest.read(directory)
    rows = {"digest": found.digest, "llmpipe": found.version, **_source_rows(found.source)}
    source = None
    if holds_weights(directory):
        try:
            source = open_source(directory, told)
            rows |= _weight_rows(source)
        except UserError as error:
            rows["model"] = f"cannot be read: {error}"
    elif holds_adapter(directory):
        try:
            rows |= _adapter_rows(directory)
        except UserError as error:  # the manifest can be shown all the same
            rows["adapter"] = str(error)
    lines = [f"{found.kind} {directory}", *_lines(rows)]
    lines += ["", f"files, {sum(entry['bytes'] for entry in found.files.values()):,} bytes"]
    for name, entry in sorted(found.files.items()):
        lines.append(f"  {entry['bytes']:>15,}  {(entry['sha256'] or 'not hashed')[:12]:<12}  {name}")
    return "\n".join(lines + (tensor_lines(source) if tensors and source else []))


def describe_weights(path: Path, tensors: bool = False, told: Told = NOTHING) -> str:
    """Weights as they came, without a manifest: format, shape, types, its tensors on request.

    UserError as in `open_source`: if a tensor is missing, left over, or of a wrong shape.
    """
    source = open_source(path, told)
    lines = [f"{detect(path)} weights {path}", *_lines(_weight_rows(source))]
    return "\n".join(lines + (tensor_lines(source) if tensors else []))


def holds_adapter(path: Path) -> bool:
    """Whether a directory is an adapter of PEFT's."""
    return (path / adapter_files.CONFIG).is_file()


def describe_adapter(path: Path) -> str:
    """A LoRA adapter of PEFT's: what it was trained on, its rank, what it changes. UserError if none can be merged."""
    lines = [f"adapter {path}", *_lines(_adapter_rows(path))]
    return "\n".join([*lines, "", f"llmpipe convert BASE --adapter {path} --output DIR merges it into its base"])


def _adapter_rows(path: Path) -> dict[str, str]:
    found = adapter_files.read_adapter(path)
    config, kinds = found.config, {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    kind = next((name for key, name in kinds.items() if config.get(key)), "LoRA")
    revision = f" at {config['revision']}" if config.get("revision") else ""
    patterns = [json.dumps(config[key]) for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    targets = config.get("target_modules") or "not said"
    own = [f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in sorted(found.replaced.items())]
    rows = {
        "base": f"{config.get('base_model_name_or_path') or 'not said'}{revision}",
        "kind": ", ".join([kind, f"rank {config['r']}", f"alpha {config['lora_alpha']}", *patterns]),
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "adds to": f"{len(found.deltas)} tensors",
        "replaces": ", ".join(own[:4]) + (f" and {len(own) - 4} more" if len(own) > 4 else ""),
        "tokenizer": tokenizer_folder.file_at(path).name if tokenizer_folder.holds(path) else "",
    }
    return {name: value for name, value in rows.items() if value}


def tensor_lines(source: TensorSource) -> list[str]:
    """Type, sizes and our name of each tensor."""
    table = FAMILIES[source.shape.family].keys(source.shape)
    sizes = {key: "x".join(map(str, table[key].shape(source.shape))) for key in source.keys()}  # noqa: SIM118
    width = max(len(size) for size in sizes.values())
    return ["", "tensors", *(f"  {_dtype(source, key):<9} {size:>{width}}  {key}" for key, size in sizes.items())]


def _lines(rows: dict[str, str]) -> list[str]:
    return [f"  {name:<13} {value}" for name, value in rows.items()]


def _source_rows(source: dict[str, Any]) -> dict[str, str]:
    return {f"source {key}": value if isinstance(value, str) else json.dumps(value) for key, value in source.items()}


def _weight_rows(source: TensorSource) -> dict[str, str]:
    table = FAMILIES[source.shape.family].keys(source.shape)
    count, parameters, size = dict[str, int](), 0, 0
    for key in source.keys():  # noqa: SIM118
        dtype, elements = _dtype(source, key), math.prod(table[key].shape(source.shape))
        count[dtype] = count.get(dtype, 0) + 1
        parameters, size = parameters + elements, size + elements * source.dtype(key).itemsize
    types = ", ".join(dtype if len(count) == 1 else f"{dtype} ({number} tensors)" for dtype, number in count.items())
    dialect = source.dialect if isinstance(source, MegatronSource) else None
    return {
        **({"dialect": f"{dialect.name}, of {dialect.system}"} if dialect else {}),
        "model": f"{source.shape.family}, {parameters:,} parameters in {sum(count.values())} tensors",
        **_shape_rows(source.shape),
        "stored as": f"{types}; {size:,} bytes",
    }


def _dtype(source: TensorSource, key: str) -> str:
    return str(source.dtype(key)).removeprefix("torch.")


# The fields that `_shape_rows` says in words.
_SAID = {
    "family", "num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "ffn", "vocab", "max_positions",
    "norm_eps", "rope_theta", "rope_scaling", "tie_embeddings",
}  # fmt: skip


def _shape_rows(shape: Shape) -> dict[str, str]:
    heads = f"{shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} KV heads"
    scaling = f", scaling {json.dumps(shape.rope_scaling)}" if shape.rope_scaling else ""
    rows = {
        "layers": f"{shape.num_layers}, {shape.hidden} wide, MLP {shape.ffn}, {heads}",
        "vocabulary": f"{shape.vocab:,} tokens, {'tied' if shape.tie_embeddings else 'separate'} output head",
        "positions": f"{shape.max_positions:,}, rotary theta {shape.rope_theta:g}{scaling}",
        "norm eps": f"{shape.norm_eps:g}",
    }
    other = [field for field in fields(shape) if field.name not in _SAID and field.default is not MISSING]
    unusual = {field.name: getattr(shape, field.name) for field in other}
    return rows | {f.name: str(unusual[f.name]) for f in other if unusual[f.name] != f.default}

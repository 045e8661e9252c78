"""What a directory with a manifest holds, as text for `llmpipe inspect`: checkpoints, rank files, weights, exports."""

import json
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import manifest
from llmpipe.families import FAMILIES, from_hf_config
from llmpipe.families.family import Shape


def describe(directory: Path) -> str:
    """Kind, source, digest, the model's shape, and the files."""
    found = manifest.read(directory)
    rows = {"digest": found.digest, "llmpipe": found.version, **_source_rows(found.source)}
    config = directory / "config.json"
    if config.is_file():
        rows |= _shape_rows(from_hf_config(json.loads(config.read_text()), str(config)))
    lines = [f"{found.kind} {directory}", *(f"  {name:<14}{value}" for name, value in rows.items())]
    lines += ["", f"files, {sum(entry['bytes'] for entry in found.files.values()):,} bytes"]
    lines += [f"  {entry['bytes']:>15,}  {entry['sha256'][:12]}  {name}" for name, entry in sorted(found.files.items())]
    return "\n".join(lines)


def _source_rows(source: dict[str, Any]) -> dict[str, str]:
    return {f"source {key}": value if isinstance(value, str) else json.dumps(value) for key, value in source.items()}


def _shape_rows(shape: Shape) -> dict[str, str]:
    family = FAMILIES[shape.family]
    heads = f"{shape.num_heads} heads of {shape.head_dim}, {shape.num_kv_heads} KV heads"
    return {
        "model": f"{shape.family}, {family.num_parameters(shape):,} parameters in {len(family.keys(shape))} tensors",
        "layers": f"{shape.num_layers}, {shape.hidden} wide, MLP {shape.ffn}, {heads}",
        "vocabulary": f"{shape.vocab:,} tokens, {'tied' if shape.tie_embeddings else 'separate'} output head",
        "positions": f"{shape.max_positions:,}, rotary theta {shape.rope_theta:g}",
    }

"""What a user told convert of a source beyond its files, from the manifest, in the words of the card."""

from typing import Any

_WORDS = {
    "num_heads": "query heads",
    "num_kv_heads": "KV heads",
    "head_dim": "head size",
    "norm_eps": "norm eps",
    "rope_theta": "rope theta",
    "vocab": "vocabulary",
    "max_positions": "longest sequence",
}


def said(source: dict[str, Any]) -> dict[str, float | str]:
    """Settings that go before a Megatron's or EasyLM's files, whose own word on them may be a default never meant."""
    told = source.get("told", {})
    shape = told.get("shape", {})
    found: dict[str, float | str] = {word: float(shape[name]) for name, word in _WORDS.items() if name in shape}
    found |= {**_scaling(shape), **_window(shape)} if shape else {}
    return found | ({"vocabulary": float(told["vocab"])} if "vocab" in told else {})


def _scaling(shape: dict[str, Any]) -> dict[str, float | str]:
    scaling = shape.get("rope_scaling") or {"rope_type": "default"}
    return {"rope scaling" if key == "rope_type" else f"rope {key}": value for key, value in scaling.items()}


def _window(shape: dict[str, Any]) -> dict[str, float | str]:
    size = shape.get("window")
    return {"window": f"{size} from layer {shape.get('window_from', 0)}" if size else "none"}


def old_permutation(source: dict[str, Any]) -> bool:
    """Whether Megatron-LLM's files are of before its permute_qkv.py, which nothing in them says."""
    return source.get("told", {}).get("dialect") == "epf-old"

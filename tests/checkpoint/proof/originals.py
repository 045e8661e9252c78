"""What the originals wrote (docs/proof), and the tiny checkpoints that they wrote it of (benchmarks/proof)."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path.append(str(ROOT / "benchmarks/proof"))  # the recipes import each other

from record import flat, tensors  # noqa: E402
from tiny import state_dict, write  # noqa: E402

__all__ = ["cases", "flat", "state_dict", "tensors", "write"]

Entries = dict[str, dict[str, Any]]


def cases(system: str, direction: str) -> list[dict[str, Any]]:
    """The cases of one record and direction that the original did not fail."""
    record = json.loads((ROOT / f"docs/proof/{system}.json").read_text())
    return [case for case in record["cases"] if case["direction"] == direction and "error" not in case]


def ident(case: dict[str, Any]) -> str:
    """A case's name in pytest's output."""
    names = ("model_size", "shape", "dtype", "tp", "pp", "shards", "pth_shards")
    return "-".join(str(case[name]) for name in names if name in case)

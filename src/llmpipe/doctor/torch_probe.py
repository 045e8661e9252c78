"""What torch says of itself and of the GPUs, as JSON: `python -m llmpipe.doctor.torch_probe`.

In a process of its own, which can be given up: a broken driver may hang for ever.
"""

import json
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from llmpipe.errors import UserError
from llmpipe.parallel.compat import varlen_takes
from llmpipe.train.apex import MODULES, check_apex


def facts() -> dict[str, Any]:
    """Everything that the checks ask for."""
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": _nccl(),
        **_gpus(),
        "varlen": {"grouped queries": varlen_takes(True, None), "windows": varlen_takes(False, 4096)},
        "apex": _apex(),
    }


def _nccl() -> str | None:
    if torch.version.cuda is None or not dist.is_nccl_available():
        return None
    return ".".join(map(str, nccl.version()))


def _gpus() -> dict[str, Any]:
    """Those that torch can use, or why it cannot."""
    try:
        if torch.version.cuda is not None:
            torch.cuda.init()
        return {"gpus": [_gpu(number) for number in range(torch.cuda.device_count())], "error": ""}
    except (RuntimeError, AssertionError) as error:
        return {"gpus": [], "error": str(error).splitlines()[0]}


def _gpu(number: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(number)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
    }


def _apex() -> dict[str, str | None] | None:
    """For each kind of kernel what is wrong with it; None without any package of the name apex."""
    return {kind: _apex_problem(kind) for kind in MODULES} if find_spec("apex") else None


def _apex_problem(kind: str) -> str | None:
    try:
        check_apex([kind], "cuda")
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    print(json.dumps(facts()))

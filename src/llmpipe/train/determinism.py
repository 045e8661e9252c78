"""Kernels that give the same bits each time; those that cannot are named once, in the log."""

import logging
import os
import warnings
from typing import Any

import torch
from torch.utils import deterministic

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_KNOWN = "does not have a deterministic implementation"
log = logging.getLogger(__name__)


def use_deterministic_kernels() -> None:
    """Take them from here on, for the whole process; call it before the first kernel runs."""
    os.environ.setdefault(CUBLAS, ":4096:8")  # without it cuBLAS's own choice may differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = False
    warnings.filterwarnings("always", message=f".*{_KNOWN}")
    show, named = warnings.showwarning, set[str]()

    def name_once(message: Warning | str, *where: Any, **more: Any) -> None:
        kernel, found, _ = str(message).partition(f" {_KNOWN}")
        if not found:
            show(message, *where, **more)
        elif kernel not in named:
            named.add(kernel)
            log.warning("deterministic: %s cannot be: its results may differ in the last bits from run to run", kernel)

    warnings.showwarning = name_once

"""Kernels that give the same bits each time; one that cannot ends the training, by its name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from llmpipe.errors import UserError

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CANNOT = " does not have a deterministic implementation"


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Take them in here; enter it before the first kernel runs.

    Torch's milder mode, which only warns, will not do: attention's backward then takes the kernel that is not.
    """
    os.environ.setdefault(CUBLAS, ":4096:8")  # without it cuBLAS's own choice may differ from run to run
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads what is not written
    try:
        yield
    except RuntimeError as error:
        kernel, cannot, _ = str(error).partition(_CANNOT)
        if not cannot:
            raise
        raise UserError(
            f"deterministic: {kernel.split()[-1]} cannot be: torch has no such kernel of it here, so the same run could"
            " end in other bits; leave deterministic out of the recipe, or the key that asks for this kernel"
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]

"""NVIDIA apex's fused kernels, where a recipe asks for them: FusedAdam and FusedRMSNorm.

The package named apex on the Python package index is another project.
"""

import importlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from llmpipe.errors import UserError
from llmpipe.model.layer import RMSNorm

SOURCE = "https://github.com/NVIDIA/apex"
MODULES = {
    "adamw": ("apex.optimizers", "amp_C"),
    "rms_norm": ("apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"),
}
"""What each kind of kernel is called from, and its compiled part."""


def check_apex(kinds: Sequence[str], device: str) -> None:
    """UserError, with what to do, if these kernels of apex are not there."""
    if kinds and device != "cuda":
        raise UserError(f"apex: {kinds} are kernels of GPUs, and the layout's device is {device}: take apex: []")
    for kind in kinds:
        _import(kind)
        if find_spec(MODULES[kind][1]) is None:
            raise UserError(
                f"apex: [{kind}] needs apex's compiled {MODULES[kind][1]}, which this apex was built without: build it"
                f" with its CUDA extensions ({SOURCE}), or take apex: []"
            )


def _import(kind: str) -> ModuleType:
    try:
        return importlib.import_module(MODULES[kind][0])
    except ImportError as error:
        try:
            other = version("apex")
        except PackageNotFoundError:
            found = "which is not installed"
        else:
            found = (
                f"but the package apex {other} that is installed here has no {MODULES[kind][0]} ({error}): on the"
                " Python package index that name is another project's; uninstall it"
            )
        raise UserError(
            f"apex: [{kind}] asks for NVIDIA's apex, {found}; build NVIDIA's from {SOURCE}, or take apex: []"
        ) from error


def fused_adamw() -> type[torch.optim.Optimizer]:
    """apex's FusedAdam, which is AdamW as it comes."""
    return _import("adamw").FusedAdam


def use_fused_rms_norm(model: nn.Module) -> None:
    """The model's RMS norms go through apex's kernel from here on."""
    kernel = _import("rms_norm").fused_rms_norm_affine

    def fused(x: torch.Tensor, shape: list[int], weight: torch.Tensor, eps: float) -> Any:
        return kernel(x, weight, shape, eps)

    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.kernel = fused

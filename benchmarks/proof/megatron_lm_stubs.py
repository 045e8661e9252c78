"""What Megatron-LM and Transformer Engine ask of a GPU machine, stood in for: see megatron_lm.py."""

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

ABSENT = [
    "transformer_engine_torch",
    "fused_weight_gradient_mlp_cuda",
    "flash_attn",
    "flash_attn.flash_attn_interface",
    "flash_attn_2_cuda",
]


class Nothing:
    """Loads a module that is in sys.modules already."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Absent(types.ModuleType):
    """A module whose every name is there and does nothing."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, Nothing())  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


class LocalNorm(torch.nn.RMSNorm):
    """RMSNorm with the arguments of Megatron's norms."""

    def __init__(self, config: object, hidden_size: int, eps: float = 1e-5, **_: object):
        super().__init__(hidden_size, eps)


def stub_transformer_engine() -> None:
    """Its Python part is imported, its compiled part is not there."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the CUDA libraries are not loaded
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "2.4.2" if name == "flash-attn" else version(name)
    common = __import__("transformer_engine.common").common
    folder = Path(tempfile.mkdtemp())
    (folder / "transformer_engine_torch.absent.so").touch()
    common.get_te_path, common.is_package_installed = (lambda: folder), (lambda name: False)
    found = importlib.util.spec_from_file_location

    def spec_of(name: str, *rest: Any, **options: Any) -> importlib.machinery.ModuleSpec | None:
        if name == "transformer_engine_torch":
            return importlib.machinery.ModuleSpec(name, Nothing())  # type: ignore[arg-type]
        return found(name, *rest, **options)

    importlib.util.spec_from_file_location = spec_of
    extensions = __import__("transformer_engine.pytorch.cpp_extensions").pytorch.cpp_extensions
    extensions.get_cudnn_version = lambda: 90100
    extensions.__getattr__ = sys.modules["transformer_engine_torch"].__getattr__  # what its `import *` would bring


def stub(repository: Path) -> None:
    """Everything that the originals ask of a GPU machine."""
    sys.path[:0] = [str(repository), str(repository / "tools" / "checkpoint")]
    sys.modules |= {name: Absent(name) for name in ABSENT}
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(major=8, minor=0, multi_processor_count=1)
    stub_transformer_engine()
    torch.cuda.Stream = MagicMock  # only now: torch._dynamo, imported above, looks at it
    torch.cuda.is_available = lambda: True
    from megatron.core.models.gpt import gpt_layer_specs  # type: ignore[import-not-found]
    from megatron.legacy import fused_kernels  # type: ignore[import-not-found]

    fused_kernels.load = lambda _: None
    gpt_layer_specs.LNImpl = LocalNorm

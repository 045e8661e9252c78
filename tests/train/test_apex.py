"""The wiring to NVIDIA's apex, with doubles of what it has: FusedAdam's signature and fused_rms_norm_affine's."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from jobs import RECIPE

from llmpipe.errors import UserError
from llmpipe.families import named_size
from llmpipe.layout import Layout
from llmpipe.model.layer import RMSNorm
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks
from llmpipe.parallel.tensor import Weight
from llmpipe.train.apex import check_apex, use_fused_rms_norm
from llmpipe.train.optimizer import Optimizer


class FusedAdam(torch.optim.AdamW):
    """As apex's: no `fused`, no look for `grad_scale`; the number of steps is each group's, not each parameter's."""

    def __init__(self, params, lr, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]))
            group["step"] = group.get("step", 0) + 1
        super().step()
        for state in self.state.values():
            del state["step"]


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(members)
    return made


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, float]]:
    """An apex with the two kernels that are asked for; notes the norms' calls."""
    calls: list[tuple[torch.Size, float]] = []

    def fused_rms_norm_affine(x, weight, normalized_shape, eps=1e-6, memory_efficient=False) -> torch.Tensor:
        calls.append((x.shape, eps))
        return F.rms_norm(x, normalized_shape, weight, eps)

    layer_norm = module("apex.normalization.fused_layer_norm", fused_rms_norm_affine=fused_rms_norm_affine)
    for made in (module("apex"), module("apex.normalization"), layer_norm, module("apex.optimizers")):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(sys.modules["apex.optimizers"], "FusedAdam", FusedAdam, raising=False)
    return calls


def test_adamw_steps_as_torchs(apex) -> None:
    recipe = replace(RECIPE, eps=1e-6, clip=0.5)  # the first of the gradients is shorter
    with_apex, without = (run_ranks(stepped, 1, replace(recipe, apex=kinds))[0] for kinds in (["adamw"], []))
    assert with_apex == (pytest.approx(without[0], rel=1e-6), "FusedAdam", [8, 8])
    assert without[1] == "AdamW"


def stepped(recipe) -> tuple[list[float], str, list[int]]:
    """Weights of a matrix and a norm after two steps, resumed at the fifth; the optimizer's name, its groups' steps."""
    groups = make_groups(Layout(gpus_per_node=1, device="cpu").resolved(), torch.device("cpu"))
    model = torch.nn.ModuleDict({"embedding": Weight(2, 3), "norm": Weight(3)})
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    optimizer = Optimizer(model, named_size("llama2_7b"), recipe, groups)
    for step in range(3):
        if step == 2:
            optimizer.resume(7, optimizer.counters())
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.reduce_and_clip()
        optimizer.step(1e-2, 0.1)
    weights = [value for p in model.parameters() for value in p.detach().flatten().tolist()]
    steps = [group.get("step", 0) for group in optimizer.adamw.param_groups]
    return weights, type(optimizer.adamw).__name__, steps


def test_rms_norms_go_through_the_kernel(apex) -> None:
    norm = RMSNorm(4, eps=1e-3)
    norm.weight.data.fill_(2.0)
    x = torch.randn(5, 4)
    expected = norm(x)
    assert apex == []
    use_fused_rms_norm(torch.nn.Sequential(norm))
    assert torch.equal(norm(x), expected) and apex == [(x.shape, 1e-3)]


def test_what_is_not_nvidias_apex_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_apex([], "cpu")
    with pytest.raises(UserError, match=r"are kernels of GPUs, and the layout's device is cpu: take apex: \[\]"):
        check_apex(["adamw"], "cpu")
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="NVIDIA's apex, which is not installed; build NVIDIA's from https://github"):
        check_apex(["adamw"], "cuda")
    monkeypatch.setattr("llmpipe.train.apex.version", lambda _: "0.9.10.dev0")
    with pytest.raises(
        UserError, match=r"the package apex 0\.9\.10\.dev0 .* that name is another project's; uninstall"
    ):
        check_apex(["adamw"], "cuda")


def test_an_apex_without_kernels_is_refused(apex) -> None:
    with pytest.raises(
        UserError, match="needs apex's compiled fused_layer_norm_cuda, which this apex was built without"
    ):
        check_apex(["rms_norm"], "cuda")


def test_apex_and_bf16_state_exclude_each_other() -> None:
    with pytest.raises(UserError, match="apex: adamw keeps fp32 state, parameters: bf16 keeps bf16"):
        replace(RECIPE, apex=["adamw"], parameters="bf16")

"""Packed documents on a GPU: the kernels that only it has, against the CPU's arithmetic; skipped where none is."""

import pytest
import torch

from llmpipe.model import attention
from llmpipe.model.attention import attend
from llmpipe.model.flex import flex_causal
from llmpipe.model.packed import Packed
from llmpipe.parallel.groups import ContextParallel
from llmpipe.train.determinism import deterministic_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

N = 1000
BOUNDS = torch.tensor([0, 1, 130, 300, 940, 1000, 1000], dtype=torch.int32)
WINDOWS = [None, 1, 100, 640, 5000]


def by_varlen(q, k, v, packed, window):
    if not attention.varlen_takes(True, window):
        pytest.skip(f"torch {torch.__version__}'s variable-length kernel has no grouped queries, or no windows")
    return attention.varlen_causal(q, k, v, packed.cu_queries, packed.cu_keys, *packed.longest, window)


KERNELS = {"varlen": by_varlen, "flex": flex_causal, "attend": attend, "one by one": attention._piece_by_piece}


def qkv(dtype: torch.dtype, device: str = "cuda") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(N, heads, 64, generator=generator).to(dtype) for heads in (8, 2, 2)]
    return [tensor.to(device).requires_grad_() for tensor in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_values_and_gradients_are_those_of_fp32_on_the_cpu(kernel: str, window: int | None, dtype: torch.dtype) -> None:
    given = qkv(dtype)
    exact = [tensor.detach().float().cpu().requires_grad_() for tensor in given]
    pull = torch.randn(N, 8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = KERNELS[kernel](*given, Packed(BOUNDS.cuda()), window)
    out.backward(pull.cuda())
    expected = attend(*exact, Packed(BOUNDS), window)
    expected.backward(pull.float())
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(out.detach().float().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)
    for found, reference in zip(given, exact, strict=True):
        error = (found.grad.float().cpu() - reference.grad).norm() / reference.grad.norm()
        assert error <= tolerance


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_document_moves_no_other_documents_values_or_gradients(kernel: str, window: int | None) -> None:
    """All of document 130 to 300 is another one: the others' bits stay."""

    def of(change: float) -> list[torch.Tensor]:
        given = qkv(torch.bfloat16)
        with torch.no_grad():
            for tensor in given:
                tensor[130:300] += change
        out = KERNELS[kernel](*given, Packed(BOUNDS.cuda()), window)
        out.float().square().sum().backward()
        return [out.detach(), *(tensor.grad for tensor in given)]

    with deterministic_kernels():  # else backward passes add up in the order in which their blocks end
        given, other = of(0.0), of(1.0)
    for before, after in zip(given, other, strict=True):
        moved = (before != after).flatten(1).any(dim=1)
        assert not moved[:130].any() and not moved[300:].any()
    out, changed = given[0], other[0]
    assert (out[130:300] != changed[130:300]).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_a_context_ranks_queries_see_keys_that_end_with_them(kernel: str, window: int | None, rank: int) -> None:
    given = qkv(torch.bfloat16)
    exact = [tensor.detach().float().cpu().requires_grad_() for tensor in given]
    pull = torch.randn(N, 8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = Packed(BOUNDS.cuda(), ContextParallel(None, 2, rank))
    q, k, v = (
        torch.cat([x[part] for part in parts])
        for x, parts in zip(given, (packed.own, packed.seen, packed.seen), strict=True)
    )
    own = torch.cat([torch.arange(part.start, part.stop) for part in packed.own])
    out = KERNELS[kernel](q, k, v, packed, window)
    out.backward(pull[own].cuda())
    expected = attend(*exact, Packed(BOUNDS), window)[own]
    expected.backward(pull[own].float())
    torch.testing.assert_close(out.detach().float().cpu(), expected.detach(), rtol=2e-2, atol=2e-2)
    for found, reference in zip(given, exact, strict=True):
        assert (found.grad.float().cpu() - reference.grad).norm() <= 2e-2 * reference.grad.norm()


def test_dropout_on_a_gpu_follows_from_its_key() -> None:
    given, packed = qkv(torch.bfloat16), Packed(BOUNDS.cuda())
    state = torch.cuda.get_rng_state()
    first, again, other = (attend(*given, packed, None, 0.2, (7, layer)) for layer in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.cuda.get_rng_state(), state)

"""The linear cross-entropy against torch's, split over chunks and ranks, and the memory that it takes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from live_bytes import Live
from llmpipe.layout import Layout
from llmpipe.model import loss
from llmpipe.model.loss import Rows, linear_cross_entropy
from llmpipe.parallel.groups import TensorParallel, make_groups
from llmpipe.parallel.processes import run_ranks

TOKENS, HIDDEN, VOCAB = 24, 8, 11
FEW = [10_000, 5, 1]  # tokens in a chunk


def given() -> tuple[torch.Tensor, ...]:
    """Hidden states, head, labels, weights."""
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return x, head, labels, torch.rand(TOKENS, generator=generator)


def expected(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Σ weights·ℓ by torch, times 3, and the gradients of hidden states and head."""
    x, head, labels, weights = given()
    x, head = x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    total = (F.cross_entropy(x @ head.t(), labels, reduction="none") * weights).sum()
    (3 * total).backward()
    return total.detach(), x.grad, head.grad


def likeliest() -> torch.Tensor:
    """(TOKENS,) which labels are the argmax."""
    x, head, labels, _ = given()
    return (x @ head.t()).argmax(-1) == labels


def assert_close(found: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    assert (found - reference).abs().max() <= tolerance * reference.abs().max()


@pytest.mark.parametrize("chunk_tokens", FEW)
def test_loss_and_gradients_are_torchs(chunk_tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk_tokens)
    x, head, labels, weights = given()
    x.requires_grad_()
    head.requires_grad_()
    total, hits = linear_cross_entropy(x, head, labels, weights, Rows(TensorParallel(), 0))
    (3 * total).sum().backward()
    for found, reference in zip((total, x.grad, head.grad), expected(), strict=True):
        assert_close(found, reference, 1e-6)
    assert hits.equal(likeliest()) and 0 < hits.sum() < TOKENS


def split(chunk_tokens: int, tp: int) -> list[Any]:
    loss.CHUNK_TOKENS = chunk_tokens  # of this forked process
    groups = make_groups(Layout(tp=tp, gpus_per_node=tp, device="cpu").resolved(), torch.device("cpu"))
    x, head, labels, weights = given()
    each = -(-VOCAB // tp)
    first, own = groups.at.tp * each, TOKENS // tp
    head = head[first : first + each].clone().requires_grad_()
    x = x[groups.at.tp * own : (groups.at.tp + 1) * own].clone().requires_grad_()
    total, hits = linear_cross_entropy(x, head, labels, weights, Rows(groups.tp, first))
    (3 * total).sum().backward()
    assert hits.equal(likeliest())
    return [tensor.detach().numpy() for tensor in (total, x.grad, head.grad)]


@pytest.mark.parametrize(("tp", "chunk_tokens"), [(2, 10_000), (2, 10), (3, 9), (4, 1)])
def test_split_vocabulary_and_split_sequence(tp: int, chunk_tokens: int) -> None:
    """The last rank has fewer rows, and a rank's last chunk fewer tokens."""
    totals, of_x, of_head = zip(*run_ranks(split, tp, chunk_tokens, tp), strict=True)
    total, grad_x, grad_head = expected()
    for found in totals:
        assert_close(torch.from_numpy(found), total, 1e-6)
    assert_close(torch.cat([torch.from_numpy(part) for part in of_x]), grad_x, 1e-6)
    assert_close(torch.cat([torch.from_numpy(part) for part in of_head]), grad_head, 1e-6)


def test_bf16_sums_the_heads_gradient_over_chunks_in_fp32(monkeypatch) -> None:
    """Against fp64 from the same bf16 values: no worse than one product's own rounding, 2⁻⁸, however many chunks."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)
    x, head = torch.ones(1000, 8, dtype=torch.bfloat16), torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1000, dtype=torch.int64)
    linear_cross_entropy(x, head, labels, torch.ones(1000), Rows(TensorParallel(), 0))[0].sum().backward()
    # With equal logits each token's gradient is 1/16 in every row, less 1 in the label's: 1000 of them are summed.
    assert_close(head.grad[1:].double(), torch.full((15, 8), 1000 / 16, dtype=torch.float64), 2**-8)
    assert_close(head.grad[:1].double(), torch.full((1, 8), -1000 * 15 / 16, dtype=torch.float64), 2**-8)


def test_without_gradients_none_are_made() -> None:
    x, head, labels, weights = given()
    head.requires_grad_()
    rows = Rows(TensorParallel(), 0)
    with torch.no_grad():
        total, _ = linear_cross_entropy(x, head, labels, weights, rows)
    assert not total.requires_grad
    assert_close(total, expected()[0], 1e-6)
    trained, _ = linear_cross_entropy(x.requires_grad_(), head.detach(), labels, weights, rows)  # a frozen head
    (3 * trained).sum().backward()
    assert_close(x.grad, expected()[1], 1e-6)


def peak_bytes(tokens: int, vocab: int, hidden: int) -> int:
    x, head = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=True)
    labels, weights = torch.randint(vocab, (tokens,)), torch.ones(tokens)
    with Live() as live:
        linear_cross_entropy(x, head, labels, weights, Rows(TensorParallel(), 0))[0].sum().backward()
    return live.peak


def test_memory_is_a_chunks_logits_beside_the_gradients(monkeypatch) -> None:
    tokens, vocab, hidden, chunk = 2048, 4096, 128, 64
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    logits, inputs = 4 * chunk * vocab, 4 * (tokens + vocab) * hidden
    peak = peak_bytes(tokens, vocab, hidden)
    # The inputs, their gradients, no second copy of these, and a few numbers for each token.
    assert logits + 2 * inputs < peak < 1.1 * (logits + 2 * inputs)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", tokens)  # that this sees logits which are held
    assert peak_bytes(tokens, vocab, hidden) > 4 * tokens * vocab

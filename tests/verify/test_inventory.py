"""Fingerprints: equal for the same rows in their order or the other rotary one, and for nothing else."""

import pytest
import torch

from llmpipe.verify.inventory import fingerprint, largest_rounding, layer_number, lossy, rotary_fingerprints
from llmpipe.verify.memory import _group_limits

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=TYPES, ids=str)
def matrix(request):
    return torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).to(request.param)


def same(one, other):
    return fingerprint(one, one.dtype) == fingerprint(other, one.dtype)


def interleaved(matrix, head_dim):
    half = head_dim // 2
    order = [
        head + i + which * half for head in range(0, len(matrix), head_dim) for i in range(half) for which in (0, 1)
    ]
    return matrix[order]


def test_the_order_of_rows_matters_but_for_the_rotary_one(matrix):
    own = fingerprint(matrix, matrix.dtype)
    for head_dim in (2, 10, 50):
        turned = interleaved(matrix, head_dim)
        assert own in rotary_fingerprints(turned, matrix.dtype, head_dim)
        assert fingerprint(turned, matrix.dtype) in rotary_fingerprints(matrix, matrix.dtype, head_dim)
    swapped = matrix[[1, 0, *range(2, 50)]]
    others = [fingerprint(swapped, matrix.dtype), *rotary_fingerprints(interleaved(matrix, 50), matrix.dtype, 10)]
    assert own not in [*others, *rotary_fingerprints(swapped, matrix.dtype, 10)]


def test_the_layer_stands_in_the_name_in_every_format():
    names = ["model.layers.12.mlp.up_proj.weight", "transformer.h.12.ln_attn.bias", "layers.12.attention.wq.weight",
             "transformer/h/12/ffn_norm/kernel", "language_model.encoder.layers.12.input_layernorm.weight"]  # fmt: skip
    assert {layer_number(name) for name in names} == {12}
    assert layer_number("model.embed_tokens.weight") is None and layer_number("transformer/ln_f/kernel") is None


def test_everything_else_does(matrix):
    nearest = matrix.clone()
    nearest[3, 4] = torch.nextafter(nearest[3, 4].float(), torch.tensor(9.0)) if matrix.dtype == torch.float32 else 9.0
    moved = matrix.clone()
    moved[[0, 1], 2] = moved[[1, 0], 2]  # the values of a column, in other rows
    twice = matrix.clone()
    twice[1] = twice[0]
    for other in (nearest, moved, twice, matrix.flip(1), matrix[:-1], matrix.view(25, 24), -matrix, matrix.flip(0)):
        assert not same(matrix, other)


def test_a_vector_is_one_row():
    vector = torch.arange(6.0)
    assert same(vector, vector.clone()) and not same(vector, vector.flip(0))


def test_parts_of_a_large_tensor_add_up(monkeypatch):
    matrix = torch.randn(64, 16)
    whole = fingerprint(matrix, matrix.dtype)
    monkeypatch.setattr("llmpipe.verify.inventory._CHUNK", 48)
    assert fingerprint(matrix, matrix.dtype) == whole


def test_rounding_is_measured_against_the_value():
    assert not lossy(torch.bfloat16, torch.float32) and lossy(torch.bfloat16, torch.float16)
    assert largest_rounding(torch.tensor([1.0, 2.0]), torch.bfloat16) == 0
    assert largest_rounding(torch.tensor([1.0, 256 + 1.0]), torch.bfloat16) == pytest.approx(1 / 257)
    assert largest_rounding(torch.tensor([1e6]), torch.float16) == float("inf")


def test_the_tightest_control_group_counts(tmp_path):
    """cgroup v2 as Linux shows it: a limit of the job above one of the step."""
    job = tmp_path / "job"
    step = job / "step"
    step.mkdir(parents=True)
    for folder, limit in ((job, "1000"), (step, "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("900\n")
        # Linux's Documentation/admin-guide/cgroup-v2.rst: file is all pages of files, shared memory's too.
        (folder / "memory.stat").write_text("anon 250\nfile 650\nshmem 50\ninactive_file 500\nactive_file 100\n")
    assert _group_limits(tmp_path, "0::/job/step\n") == [700]

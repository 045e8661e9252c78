"""Meta's format written: params.json against the published ones and Meta's published formula."""

from dataclasses import replace
from typing import Any

import pytest

from llmpipe.checkpoint.meta_params import by_rows, ffn_params, ffn_size, to_params
from llmpipe.checkpoint.meta_write import check_split, layout
from llmpipe.errors import UserError
from llmpipe.families import Shape, named_size

LLAMA31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def shape(**fields: Any) -> Shape:
    return replace(named_size("llama2_7b"), **fields)


def test_params_are_those_of_metas_releases() -> None:
    """Llama 2 7B and 70B, Llama 3 8B and 3.1 405B: the params.json of their downloads, the true vocab_size for -1."""
    assert to_params(shape(), rows=False) == {
        "dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": 32000,
    }  # fmt: skip
    assert to_params(shape(num_layers=80, hidden=8192, num_heads=64, num_kv_heads=8, ffn=28672), rows=False) == {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-05, "vocab_size": 32000,
    }  # fmt: skip
    llama3 = shape(num_kv_heads=8, ffn=14336, vocab=128256, rope_theta=5e5)
    assert to_params(llama3, rows=True) == {
        "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
        "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
    }  # fmt: skip
    big = replace(llama3, num_layers=126, hidden=16384, num_heads=128, num_kv_heads=8, ffn=53248, rope_scaling=LLAMA31)
    assert to_params(big, rows=True) == {
        "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256,
        "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dim", "ffn"),
    [(5120, 13824), (6656, 17920), (8192, 22016), (2048, 8192), (3072, 8192), (3200, 8640), (4096, 11009), (32, 1)],
)
def test_every_ffn_size_has_params(dim: int, ffn: int) -> None:
    """FeedForward of meta-llama/llama: hidden_dim = 4 * dim comes in."""
    params = ffn_params(dim, ffn)
    hidden = int(2 * (4 * dim) / 3)
    if "ffn_dim_multiplier" in params:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple_of = params["multiple_of"]
    assert multiple_of * ((hidden + multiple_of - 1) // multiple_of) == ffn
    assert ffn_size(dim, multiple_of, params.get("ffn_dim_multiplier")) == ffn


def test_llama_32_keeps_its_factor() -> None:
    params = to_params(shape(rope_scaling=LLAMA31 | {"factor": 32.0}), rows=True)
    assert params["use_scaled_rope"] is True
    assert params["rope_scaling_factor"] == 32.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"qkv_bias": True, "window": 512}, "biases; a window of 512 tokens"),
        ({"qk_norm": True}, "norms of q and k"),
        ({"head_dim": 64}, "heads of 64"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": LLAMA31 | {"low_freq_factor": 2.0}}, "llama3"),
        ({"family": "falcon"}, "falcon"),
    ],
)
def test_what_the_format_cannot_say_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"Meta's format cannot say .*{said}"):
        to_params(shape(**fields), rows=False)


def test_heads_go_whole_to_the_files() -> None:
    with pytest.raises(UserError, match=r"--tp 3: .*32 KV heads.*one of \[1, 2, 4, 8, 16, 32\]"):
        check_split(shape(), 3)


def test_the_embedding_is_split_by_the_vocabulary() -> None:
    small = shape(num_layers=1, hidden=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=88)
    llama3 = replace(small, vocab=128256)
    assert (by_rows(small), by_rows(llama3)) == (False, True)
    sizes = [[s.shape for s in layout(each, 2)["consolidated.01.pth"][:1]] for each in (small, llama3)]
    assert sizes == [[(32000, 16)], [(64128, 32)]]
    assert layout(llama3, 2, by_rows=False)["consolidated.01.pth"][0].shape == (128256, 16)


def test_a_tied_head_is_written_as_a_tensor() -> None:
    tied = shape(num_layers=1, tie_embeddings=True)
    stored = {each.name: each for each in layout(tied, 2)["consolidated.00.pth"]}
    (part,) = stored["output.weight"].parts
    assert (part.key, part.rows, part.cols) == ("embedding.weight", slice(0, 16000), slice(0, 4096))

"""The arithmetic of a token, counted from transformers' own parameters."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llmpipe.families import from_hf_config, named_size
from llmpipe.train.metrics import flops_per_token, known_peak, peak_flops

LENGTH = 4096


def matrices(model: torch.nn.Module) -> int:
    """Elements that a token is multiplied with: the linear layers', the head among them though it may be tied."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_flops_of_llama_2_70b() -> None:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # Causal attention: each token meets half of the others, in QK and in AV, forward once and backward twice.
    attention = 80 * 64 * 128 * (LENGTH / 2) * 2 * 2 * 3
    shape = named_size("llama2_70b")
    assert flops_per_token(shape, LENGTH, causal=True) == pytest.approx(6 * matrices(model) + attention)
    assert flops_per_token(shape, LENGTH, causal=False) == pytest.approx(6 * matrices(model) + 2 * attention)


@pytest.mark.parametrize(
    ("kind", "settings", "windowed"),
    [
        ("falcon", {}, 0),
        ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}, 0),
        ("mistral", {"sliding_window": 100}, 6),
        (
            "qwen2",
            {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2},
            4,
        ),
    ],
    ids=["falcon", "tied", "windows", "windows from layer 2"],
)
def test_flops_of_tied_heads_and_windows(kind: str, settings: dict, windowed: int) -> None:
    config = AutoConfig.for_model(kind, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = from_hf_config(json.loads(config.to_json_string()) | {"architectures": [type(model).__name__]})
    # The pairs of tokens that see each other, counted one by one; a token's own diagonal is half of it.
    seen = [sum(min(i + 1, width) - 0.5 for i in range(LENGTH)) / LENGTH for width in (LENGTH, 100)]
    pairs = (6 - windowed) * seen[0] + windowed * seen[1]
    assert flops_per_token(shape, LENGTH, causal=True) == pytest.approx(
        6 * matrices(model) + 12 * 8 * 64 * pairs, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peaks_by_the_names_that_torch_gives_gpus(name: str, peak: float | None) -> None:
    """Dense bf16, of NVIDIA's data sheets: half of what they say with sparsity."""
    assert known_peak(name) == peak


def test_what_is_not_known_is_measured_in_the_type_that_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.dtype] = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **more: made.append(more["dtype"]) or randn(*size, **more))
    assert peak_flops(torch.device("cpu"), torch.bfloat16) > 0
    assert made == [torch.bfloat16]

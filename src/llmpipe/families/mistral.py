"""Mistral: Llama with a sliding window in its first version."""

from functools import partial

from llmpipe.families.family import Family
from llmpipe.families.llama import CONFIG, TENSORS
from llmpipe.families.sizes import sized

_size = partial(sized, "mistral", 32, 4096, 32, 8, 14336, max_positions=32768)

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    tensors=TENSORS,
    config=CONFIG,
    windowed=True,
    defaults={"max_positions": 131072, "norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": 8},
    only={"hidden_act": "silu", "attention_dropout": 0.0},
    sizes={  # an instruct model has the shape of its version
        "mistral_7b_v01": _size(window=4096),
        "mistral_7b_v02": _size(rope_theta=1e6),
        "mistral_7b_v03": _size(rope_theta=1e6, vocab=32768),
    },
)

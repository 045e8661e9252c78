"""Mistral: Llama with a sliding window in its first version."""

from llmpipe.families.family import Family
from llmpipe.families.llama import CONFIG, TENSORS

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    tensors=TENSORS,
    config=CONFIG,
    windowed=True,
    defaults={"max_positions": 131072, "norm_eps": 1e-6, "tie_embeddings": False, "num_kv_heads": 8},
    only={"hidden_act": "silu", "attention_dropout": 0.0},
)

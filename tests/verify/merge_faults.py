"""What a wrong merge of an adapter would have made of a model; base and rightly merged tensors -> wrong ones."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft_files import make_adapter

Tensors = dict[str, torch.Tensor]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def flip_the_lowest_bit(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int32)
    bits[7, 2] ^= 1
    return bits.view(torch.float32)


Q, K, DOWN = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
MERGE_FAULTS: dict[str, tuple[str, Callable[[Tensors, Tensors], Tensors]]] = {  # of which kind of adapter
    "not merged": ("lora", lambda base, good: base),
    "scaled by half": ("lora", lambda base, good: {name: (base[name] + good[name]) / 2 for name in good}),
    "scaled a ten-thousandth too far": (
        "lora", lambda base, good: {name: good[name] + 1e-4 * (good[name] - base[name]) for name in good}),
    "rsLoRA as LoRA": (
        "rslora", lambda base, good: {name: base[name] + (good[name] - base[name]) / 3**0.5 for name in good}),
    "DoRA's lengths left out": ("dora", lambda base, good: good | merged_as("lora", base)),
    "DoRA's lengths without direction": (
        "dora", lambda base, good: {name: base[name] * (good[name].norm(dim=-1) / base[name].norm(dim=-1))[..., None]
                                    if base[name].ndim == 2 else base[name] for name in good}),
    "one layer of two": (
        "lora", lambda base, good: {name: base[name] if ".1." in name else good[name] for name in good}),
    "one module left out": ("patterns", lambda base, good: good | {K: base[K]}),
    "patterns left out": ("patterns", lambda base, good: merged_as("lora", base) | {DOWN: good[DOWN]}),
    "a pattern of another module": ("patterns", lambda base, good: good | {Q: base[Q] + 5 / 9 * (good[Q] - base[Q])}),
    "merged twice": ("lora", lambda base, good: {name: 2 * good[name] - base[name] for name in good}),
    "an update's sign": ("lora", lambda base, good: {name: 2 * base[name] - good[name] for name in good}),
    "q's rows in Meta's order": ("lora", lambda base, good: good | {Q: base[Q] + interleaved(good[Q] - base[Q])}),
    "embedding's factors left out": ("embedding", lambda base, good: good | {EMBED: base[EMBED]}),
    "head of its own left out": ("whole", lambda base, good: good | {HEAD: base[HEAD]}),
    "one bit of a merged tensor": ("lora", lambda base, good: good | {Q: flip_the_lowest_bit(good[Q])}),
    "one bit of another tensor": ("lora", lambda base, good: good | {EMBED: flip_the_lowest_bit(good[EMBED])}),
    "rounded to bf16 on the way": ("lora", lambda base, good: {name: good[name].bfloat16().float() for name in good}),
}  # fmt: skip


def merged_as(kind: str, base: Tensors) -> Tensors:
    """The same random factors merged by another kind's formula."""
    with tempfile.TemporaryDirectory() as folder:
        return make_adapter(kind, base, Path(folder) / "other")


def interleaved(update: torch.Tensor) -> torch.Tensor:
    return update.unflatten(0, (4, 2, 4)).transpose(1, 2).reshape(update.shape)

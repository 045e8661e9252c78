"""LoRA adapters in PEFT's files, written by hand, and what the model is with them: the papers' formulas in fp64.

PEFT 0.21.2 itself, in fp32 (its save_pretrained, its unmerged model's logits), gave the same for the kinds below and
seven more, on nine models of every family: to 1e-5 of the largest logit.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

R, ALPHA = 3, 5
SETTINGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "dense": 2}, "alpha_pattern": {r"(layers|h)\.1\..*": 9, "dense": 7}},
    "embedding": {},
    "whole": {"bias": "all", "modules_to_save": ["lm_head"]},
    "bin": {},
}
KINDS = tuple(SETTINGS)
Tensors = dict[str, torch.Tensor]


def make_adapter(kind: str, model: Tensors, path: Path) -> Tensors:
    """An adapter on every matrix of the layers; the model's tensors with it merged."""
    torch.manual_seed(7)
    held: Tensors = {}
    merged = {name: tensor.double() for name, tensor in model.items()}
    for name in [name for name in model if model[name].ndim == 2 and any(layer in name for layer in (".0.", ".1."))]:
        _add(kind, name.removesuffix(".weight"), held, merged)
    if kind == "embedding":
        name = next(name for name in model if "embed" in name)
        held[name.replace("weight", "lora_embedding_A")] = a = torch.randn(R, len(model[name])) / 4
        held[name.replace("weight", "lora_embedding_B")] = b = torch.randn(model[name].shape[1], R) / 4
        merged[name] = merged[name] + ALPHA / R * (b.double() @ a.double()).T
    if kind == "whole":
        for name in [name for name in model if name.endswith(("bias", "lm_head.weight", "model.norm.weight"))]:
            held[name] = torch.randn_like(model[name])
            merged[name] = held[name].double()
    _write(kind, held, path)
    return {name: tensor.to(model[name].dtype) for name, tensor in merged.items()}


def _add(kind: str, module: str, held: Tensors, merged: Tensors) -> None:
    weight, rank, alpha = merged[f"{module}.weight"], R, ALPHA
    if kind == "patterns":
        rank = 2 if module.endswith((".down_proj", ".dense")) else R
        alpha = 9 if ".1." in module else 7 if module.endswith(".dense") else ALPHA
    held[f"{module}.lora_A.weight"] = a = torch.randn(rank, weight.shape[1]) / 6
    held[f"{module}.lora_B.weight"] = b = torch.randn(len(weight), rank) / 6
    scaling = alpha / (rank**0.5 if kind == "rslora" else rank)
    summed = weight + scaling * b.double() @ a.double()
    if kind == "dora":
        held[f"{module}.lora_magnitude_vector"] = lengths = 0.5 + torch.rand(len(weight))
        summed = lengths.double()[:, None] * summed / summed.norm(dim=1, keepdim=True)
    merged[f"{module}.weight"] = summed


def _write(kind: str, held: Tensors, path: Path) -> None:
    path.mkdir(parents=True)
    told = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "bias": "none", "target_modules": "all-linear"}
    (path / "adapter_config.json").write_text(json.dumps(told | SETTINGS[kind]))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in held.items()}
    if kind == "bin":
        torch.save(named, path / "adapter_model.bin")
    else:
        save_file(named, path / "adapter_model.safetensors")

"""A tiny model in every format that convert reads, and what is done to its files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint.convert import Target, convert, shard
from llmpipe.layout import Stages

LAYERS, HIDDEN, HEADS, FFN, VOCAB = 4, 32, 4, 48, 131
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": VOCAB,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False,
    "hidden_act": "silu", "torch_dtype": "float32",
}  # fmt: skip
MEGATRON = {
    "mcore": Target("megatron", "mcore", 2, Stages(2)),
    "legacy": Target("megatron", "legacy", 2),
    "epf": Target("megatron", "epf", 1, Stages(2)),
    "ali": Target("megatron", "ali", 2, Stages(2)),
    "mfz": Target("megatron", "mfz", 2),
}
FORMATS = ("hf", "indexed", "bin", "meta", *MEGATRON, "torch_dist", "easylm", "ranks")
Damage = Callable[[Path], Any]
Change = Callable[[torch.Tensor], torch.Tensor | None]


def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        sizes |= {prefix + f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        sizes |= {prefix + f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        sizes[prefix + "mlp.down_proj.weight"] = (HIDDEN, FFN)
        sizes |= {prefix + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    sizes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {name: torch.randn(*size, generator=random) for name, size in sizes.items()}


def build(root: Path) -> None:
    """Every format of one model below `root`, as its makers leave it: without manifests, but for rank files."""
    held = tensors()
    write_hf(root / "hf", held, 1)
    write_hf(root / "indexed", held, 3)
    write_hf(root / "bin", held, 2, "bin")
    for name, target in {"meta": Target("meta", tp=2), "easylm": Target("easylm"), **MEGATRON}.items():
        convert(root / "hf", root / name, target)
        (root / name / "manifest.json").unlink()
    write_torch_dist(root)
    convert(root / "hf", root / "checkpoint")
    shard(root / "checkpoint", root / "ranks", 2, Stages(2))


def write_hf(path: Path, held: dict[str, torch.Tensor], count: int, suffix: str = "safetensors") -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    stem, names = "model" if suffix == "safetensors" else "pytorch_model", list(held)
    files = {f"{stem}-{k + 1:05d}-of-{count:05d}.{suffix}": names[k::count] for k in range(count)}
    files = files if count > 1 else {f"{stem}.{suffix}": names}
    for file, listed in files.items():
        state = {name: held[name] for name in listed}
        save_file(state, path / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(state, path / file)
    if count > 1:
        weight_map = {name: file for file, listed in files.items() for name in listed}
        (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_torch_dist(root: Path) -> None:
    """Megatron-LM's default: layers stacked, in torch.distributed.checkpoint's files."""
    import torch.distributed.checkpoint as dcp

    convert(root / "hf", root / "whole", Target("megatron"))
    saved = torch.load(next((root / "whole").rglob("*.pt")), weights_only=False)
    state: dict[str, Any] = {}
    for name, tensor in saved["model"].items():
        if isinstance(tensor, torch.Tensor) and name.startswith("decoder.layers."):
            state.setdefault(f"decoder.layers.{name.split('.', 3)[3]}", []).append(tensor)
        elif isinstance(tensor, torch.Tensor):
            state[name] = tensor
    state = {name: torch.stack(held) if isinstance(held, list) else held for name, held in state.items()}
    folder = root / "torch_dist/iter_0000001"
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"args": saved["args"]}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "torch_dist/latest_checkpointed_iteration.txt").write_text("1")


def weights(path: Path) -> list[Path]:
    """The files with tensors, sorted."""
    kinds = (".safetensors", ".bin", ".pth", ".pt", ".distcp")
    files = (file for file in path.rglob("*") if file.name != "common.pt")
    return sorted(file for file in files if file.suffix in kinds or file.name == "streaming_params")


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    shutil.move(first, aside)
    shutil.move(second, first)
    shutil.move(aside, second)


def edit(path: Path, change: Callable[[dict[str, Any]], bool]) -> None:
    """Change the first table of tensors that `change` takes, in whichever file it lies."""
    for file in weights(path):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            state = load_file(file)
            if change(state):
                return save_file(state, file, metadata)
        else:
            saved = torch.load(file, weights_only=False)
            if any(change(table) for table in _tables(saved)):
                return torch.save(saved, file)
    raise AssertionError(f"nothing to change in {path}")


def _tables(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    own = [value] if any(isinstance(held, torch.Tensor) for held in value.values()) else []
    return own + [table for held in value.values() for table in _tables(held)]


def to_matrix(change: Change) -> Damage:
    """Change a layer's first matrix that is not square; None leaves it out."""

    def damage(path: Path) -> None:
        def one(table: dict[str, Any]) -> bool:
            for name, tensor in table.items():
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]:
                    if "layers" not in name:
                        continue
                    changed = change(tensor)
                    if changed is None:
                        del table[name]
                    else:
                        table[name] = changed
                    return True
            return False

        edit(path, one)

    return damage

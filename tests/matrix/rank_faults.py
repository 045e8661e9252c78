"""Faults in files of several ranks: Megatron's, Meta's, rank files. Each alters a directory; False: not there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Fault = Callable[[Path], bool | None]


def swap_files(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


# Megatron's: 2 x 2 ranks of 4 layers.


def rank(path: Path, tp: int, pp: int) -> Path:
    return next(path.glob(f"*/mp_rank_{tp:02d}_{pp:03d}")) / "model_optim_rng.pt"


def megatron(tp: int, pp: int, change: Callable[[Tensors], Any], args: Callable[[Any], Any] | None = None) -> Fault:
    """Change a rank's tensors, by flat names, in place; and its args."""

    def fault(path: Path) -> bool:
        file = rank(path, tp, pp)
        content = torch.load(file, weights_only=False)
        tensors = {name: value for name, value in flat(content["model"]).items() if isinstance(value, torch.Tensor)}
        found = change(tensors)
        if args:
            args(content["args"])
        torch.save(content, file)
        return found is not False

    return fault


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def named(tensors: Tensors, *parts: str) -> torch.Tensor | None:
    return next((tensor for name, tensor in tensors.items() if any(part in name for part in parts)), None)


def changed(parts: tuple[str, ...], change: Callable[[torch.Tensor], Any]) -> Callable[[Tensors], bool]:
    """Change the first tensor with one of these in its name, in place."""

    def fault(tensors: Tensors) -> bool:
        tensor = named(tensors, *parts)
        if tensor is None:
            return False
        change(tensor)
        return True

    return fault


def exchange(parts: tuple[str, ...], stages: tuple[int, int] = (0, 0), ranks: tuple[int, int] = (0, 1)) -> Fault:
    """Swap one tensor of two ranks."""

    def fault(path: Path) -> bool:
        held: list[torch.Tensor] = []
        for tp, pp in zip(ranks, stages, strict=True):
            megatron(tp, pp, lambda tensors: held.append(named(tensors, *parts)))(path)
        if any(tensor is None for tensor in held):
            return False
        for tp, pp, tensor in zip(ranks, stages, held[::-1], strict=True):
            megatron(tp, pp, changed(parts, lambda x, tensor=tensor: x.copy_(tensor)))(path)
        return True

    return fault


QKV, FC1 = ("query_key_value", "linear_qkv.weight"), ("dense_h_to_4h", "linear_fc1.weight")
DENSE, FC2 = ("attention.dense", "linear_proj"), ("4h_to_h", "linear_fc2")
EMBEDDING = ("word_embeddings",)
NORM = ("input_layernorm", "layer_norm_weight", "input_rmsnorm", "input_norm")
_NORM1, _NORM2 = NORM, ("post_attention_layernorm", "fc1.layer_norm_weight", "post_attention_rmsnorm", "pre_mlp_layern")


def _norms(tensors: Tensors) -> bool:
    one, other = named(tensors, *_NORM1), named(tensors, "post_attention_layernorm", "linear_fc1.layer_norm_weight")
    if one is None or other is None:
        return False
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
    return True


def _bit(tensor: torch.Tensor) -> None:
    bits = tensor.view(torch.int32).flatten()
    bits[int(tensor.abs().flatten().argmin())] ^= 1


def _arg(*names: str, **how: Callable[[Any], Any]) -> Fault:
    def fault(path: Path) -> bool:
        found = []

        def set_args(args: Any) -> None:
            for name in names:
                unused = name == "rope_scaling_factor" and getattr(args, "use_rope_scaling", True) is False
                if getattr(args, name, None) is not None and not unused:
                    setattr(args, name, how["to"](getattr(args, name)))
                    found.append(name)

        for file in sorted(path.glob("*/mp_rank_*/*.pt")):
            content = torch.load(file, weights_only=False)
            set_args(content["args"])
            torch.save(content, file)
        return bool(found)

    return fault


def _padding(parts: tuple[str, ...]) -> Fault:
    """A padded row of the vocabulary's last rank is not what the format has there."""

    def fault(path: Path) -> bool:
        done = [megatron(1, pp, changed(parts, lambda x: x[-1].add_(0.5)))(path) for pp in (0, 1)]
        return any(done)

    return fault


def _stages_swapped(path: Path) -> None:
    for tp in (0, 1):
        swap_files(rank(path, tp, 0), rank(path, tp, 1))


MEGATRON_FAULTS: dict[str, Fault] = {
    "q, k, v of two ranks swapped": exchange(QKV),
    "columns of two ranks swapped, o": exchange(DENSE),
    "columns of two ranks swapped, down": exchange(FC2, (1, 1)),
    "gate and up of two ranks swapped": exchange(FC1),
    "rows of two ranks swapped, embedding": exchange(EMBEDDING),
    "a layer's matrix of another stage": exchange(DENSE, (0, 1), (0, 0)),
    "files of two ranks swapped": lambda path: swap_files(rank(path, 0, 0), rank(path, 1, 0)),
    "files of two stages swapped": _stages_swapped,
    "groups of two KV heads swapped in q, k, v": megatron(0, 1, changed(QKV, lambda x: x.copy_(swap_halves(x)))),
    "gate and up swapped": megatron(1, 0, changed(FC1, lambda x: x.copy_(swap_halves(x)))),
    "norms of a layer swapped": megatron(0, 0, _norms),
    "a copy of a norm that differs": megatron(1, 0, changed(NORM, lambda x: x.mul_(1.01))),
    "one rank's weights of another step": megatron(1, 1, lambda tensors: [t.mul_(1.001) for t in tensors.values()]),
    "lowest bit of the smallest element flipped": megatron(1, 1, changed(FC2, _bit)),
    "one value NaN": megatron(0, 1, changed(FC2, lambda x: x[3, 3].fill_(float("nan")))),
    "the last stage's copy of a tied embedding is stale": lambda path: named(
        flat(torch.load(rank(path, 0, 1), weights_only=False)["model"]), "output_layer", "lm_head") is None
    and megatron(0, 1, changed(EMBEDDING, lambda x: x.mul_(1.01)))(path),
    "padded rows trained, embedding": _padding(EMBEDDING),
    "padded rows trained, head": _padding(("output_layer", "lm_head")),
    "args: theta": _arg("rotary_base", "rope_theta", to=lambda value: value + 1),
    "args: norm eps": _arg("norm_epsilon", "layernorm_epsilon", "rmsnorm_epsilon", to=lambda value: value * 2),
    "args: KV heads": _arg("num_query_groups", "num_attention_heads_kv", to=lambda value: value * 2),
    "args: vocabulary": _arg("vocab_size", "orig_vocab_size", to=lambda value: value - 1),
    "args: longest sequence": _arg("max_position_embeddings", to=lambda value: value * 2),
    "args: rope scaling": _arg("rope_scaling_factor", to=lambda value: value * 2),
    "args: window": _arg("window_size", to=lambda value: (value[0] + 1, 0)),
}  # fmt: skip


# Meta's: 2 files.


def meta(change: Callable[[Tensors], Any], number: int = 1) -> Fault:
    def fault(path: Path) -> bool:
        file = path / f"consolidated.{number:02d}.pth"
        tensors = torch.load(file, weights_only=True)
        found = change(tensors)
        torch.save(tensors, file)
        return found is not False

    return fault


def _params(**values: Any) -> Fault:
    def fault(path: Path) -> None:
        file = path / "params.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return fault


def _of_meta(name: str, change: Callable[[torch.Tensor], torch.Tensor], number: int = 1) -> Fault:
    return meta(lambda tensors: tensors.update({name: change(tensors[name]).clone()}), number)


META_FAULTS: dict[str, Fault] = {
    "files of two ranks swapped": lambda path: swap_files(*(path / f"consolidated.{n:02d}.pth" for n in (0, 1))),
    "rotary permute left out, k": _of_meta(
        "layers.1.attention.wk.weight", lambda x: x.unflatten(0, (-1, 4, 2)).transpose(1, 2).flatten(0, 2)),
    "gate and up swapped": meta(lambda t: t.update({
        "layers.1.feed_forward.w1.weight": t["layers.1.feed_forward.w3.weight"],
        "layers.1.feed_forward.w3.weight": t["layers.1.feed_forward.w1.weight"]})),
    "a copy of a norm that differs": _of_meta("norm.weight", lambda x: x * 1.01),
    "one rank's weights of another step": meta(
        lambda tensors: [t.mul_(1.001) for name, t in tensors.items() if "norm" not in name]),
    "lowest bit of the smallest element flipped": meta(lambda t: _bit(t["layers.2.feed_forward.w2.weight"])),
    "params: theta": _params(rope_theta=12345.0),
    "params: norm eps": _params(norm_eps=1e-6),
    "params: KV heads": _params(n_kv_heads=4),
    "params: rope scaling": _params(use_scaled_rope=True),
}  # fmt: skip


# Rank files.


def ours(name: str, change: Callable[[Tensors], Any], **metadata: str) -> Fault:
    """Change a rank file's tensors in place, and what its header says."""

    def fault(path: Path) -> bool:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            return False
        with safe_open(file, framework="pt") as opened:
            said = opened.metadata()
        tensors = load_file(file)
        found = change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=said | metadata)
        return found is not False

    return fault


def _exchange(one: str, other: str, part: str) -> Fault:
    """Swap the first tensor with this in its name between two rank files."""

    def fault(path: Path) -> bool:
        files = [path / f"{name}.safetensors" for name in (one, other)]
        if not all(file.is_file() for file in files):
            return False
        held = [load_file(file) for file in files]
        keys = [next((key for key in tensors if part in key), None) for tensors in held]
        if None in keys or held[0][keys[0]].shape != held[1][keys[1]].shape:
            return False
        for name, key, tensor in ((one, keys[0], held[1][keys[1]]), (other, keys[1], held[0][keys[0]])):
            ours(name, lambda tensors, key=key, tensor=tensor: tensors.update({key: tensor}))(path)
        return True

    return fault


def _copy(name: str, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    def alter(tensors: Tensors) -> bool:
        key = next((key for key in tensors if part in key), None)
        if key:
            tensors[key] = change(tensors[key])
        return key is not None

    return ours(name, alter)


def _config(**values: Any) -> Fault:
    def fault(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return fault


def _swapped(one: str, other: str) -> Fault:
    def fault(path: Path) -> bool:
        files = [path / f"{name}.safetensors" for name in (one, other)]
        there = all(file.is_file() for file in files)
        if there:
            swap_files(*files)
        return there

    return fault


RANK_FILE_FAULTS: dict[str, Fault] = {
    "rows of two ranks swapped, q": _exchange("tp0-pp0", "tp1-pp0", "attention.q."),
    "columns of two ranks swapped, down": _exchange("tp0-pp0", "tp1-pp0", "mlp.down."),
    "rows of two ranks swapped, embedding": lambda path: ours("tp1-pp0", lambda t: t.update(
        {"embedding.weight": t["embedding.weight"].flip(0)}))(path),
    "files of two ranks swapped": _swapped("tp0-pp0", "tp1-pp0"),
    "files of two stages swapped": _swapped("tp0-pp0", "tp0-pp1"),
    "a layer's matrix of another stage": _exchange("tp0-pp0", "tp0-pp1", "mlp.up."),
    "the last stage's copy of a tied embedding is stale": _copy("tp0-pp1", "embedding.weight", lambda x: x * 1.001),
    "a copy of a KV head that differs": _copy("tp3-pp0", "attention.k.", lambda x: x * 1.001),
    "KV heads dealt in turn, not to neighbours": _exchange("tp1-pp0", "tp2-pp0", "attention.k."),
    "a copy of a norm that differs": _copy("tp1-pp0", "norm.weight", lambda x: x * 1.001),
    "lowest bit of the smallest element flipped": ours("tp1-pp0", lambda t: _bit(
        next(tensor for key, tensor in t.items() if "mlp.down" in key))),
    "one value NaN": _copy("tp0-pp0", "mlp.down.", lambda x: x.index_fill(0, torch.tensor(3), float("nan"))),
    "tensor lost": ours("tp1-pp0", lambda t: t.pop(next(key for key in t if "mlp.up" in key)) is not None),
    "tensor left over": ours("tp1-pp0", lambda t: t.update({"more.weight": torch.ones(2)})),
    "another type": _copy("tp0-pp0", "mlp.up.", lambda x: x.bfloat16()),
    "of another checkpoint": ours("tp1-pp0", lambda t: None, checkpoint="0" * 64),
    "a header of another layout": ours("tp1-pp0", lambda t: None, vp="4"),
    "config.json: norm eps": _config(rms_norm_eps=1e-6),
    "config.json: theta": _config(rope_parameters={"rope_type": "default", "rope_theta": 12345.0}),
}  # fmt: skip

"""EasyLM's files of Hugging Face's tensors, written with explicit loops: the independent truth of the tests.

`pack` is msgpack as its specification has it; tests/checkpoint/proof shows that the files are those of EasyLM itself.
"""

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

OUTSIDE = {
    "model.embed_tokens.weight": "transformer/wte/embedding",
    "model.norm.weight": "transformer/ln_f/kernel",
    "lm_head.weight": "lm_head/kernel",
}
LAYER = {
    "self_attn.q_proj.weight": "attention/wq/kernel",
    "self_attn.k_proj.weight": "attention/wk/kernel",
    "self_attn.v_proj.weight": "attention/wv/kernel",
    "self_attn.o_proj.weight": "attention/wo/kernel",
    "mlp.gate_proj.weight": "feed_forward/w1/kernel",
    "mlp.down_proj.weight": "feed_forward/w2/kernel",
    "mlp.up_proj.weight": "feed_forward/w3/kernel",
    "input_layernorm.weight": "attention_norm/kernel",
    "post_attention_layernorm.weight": "ffn_norm/kernel",
}


def easylm_tensors(hf: dict[str, torch.Tensor], head_dim: int) -> dict[str, torch.Tensor]:
    """EasyLM's tensors by name, in the order of its converter."""
    layers = 1 + max(int(name.split(".")[2]) for name in hf if name.startswith("model.layers."))
    outside = [(hf_name, name) for hf_name, name in OUTSIDE.items() if hf_name in hf]
    names = outside[:2]
    for i in range(layers):
        names += [(f"model.layers.{i}.{theirs}", f"transformer/h/{i}/{name}") for theirs, name in LAYER.items()]
    found = {}
    for theirs, name in [*names, *outside[2:]]:
        tensor = interleaved(hf[theirs], head_dim) if "/wq/" in name or "/wk/" in name else hf[theirs]
        found[name] = tensor.T.contiguous() if tensor.ndim == 2 and "/wte/" not in name else tensor
    return found


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows 0, d/2, 1, d/2 + 1, ... of each head."""
    rows = []
    for head in range(tensor.shape[0] // head_dim):
        for i in range(head_dim // 2):
            rows += [tensor[head * head_dim + i], tensor[head * head_dim + head_dim // 2 + i]]
    return torch.stack(rows)


def write_stream(path: Path, tensors: dict[str, torch.Tensor], below: str = "", chunk: int | None = None) -> Path:
    """Records one after the other; `chunk` elements a piece, as flax does beyond 1 GiB."""
    data = b""
    for name, tensor in tensors.items():
        value = pack(tensor if chunk is None else chunked(tensor, chunk))
        data += pack([(below + name).split("/"), value])
    path.write_bytes(data)
    return path


def write_nested(path: Path, tensors: dict[str, torch.Tensor], chunk: int | None = None) -> Path:
    """One map of maps."""
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, last = name.split("/")
        table = tree
        for key in outer:
            table = table.setdefault(key, {})
        table[last] = tensor if chunk is None else chunked(tensor, chunk)
    path.write_bytes(pack(tree))
    return path


def chunked(tensor: torch.Tensor, elements: int) -> Any:
    """Flax's way with a large array."""
    if tensor.numel() <= elements:
        return tensor
    pieces = tensor.reshape(-1).split(elements)
    return {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): size for i, size in enumerate(tensor.shape)},
        "chunks": {str(i): piece for i, piece in enumerate(pieces)},
    }


def pack(value: Any) -> bytes:
    """A value as msgpack, in the fewest bytes."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else _number(value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return _head(len(data), (0xA0, 32), (0xD9, 0xDA, 0xDB)) + data
    if isinstance(value, bytes):
        return _head(len(value), None, (0xC4, 0xC5, 0xC6)) + value
    if isinstance(value, torch.Tensor):
        return _array(value)
    if isinstance(value, dict):
        items: Iterable[Any] = (part for pair in value.items() for part in pair)
        return _head(len(value), (0x80, 16), (None, 0xDE, 0xDF)) + b"".join(map(pack, items))
    return _head(len(value), (0x90, 16), (None, 0xDC, 0xDD)) + b"".join(map(pack, value))


def _number(value: int) -> bytes:
    if value < 0:
        return b"\xd3" + struct.pack(">q", value)
    code, layout = next(
        (code, layout)
        for code, layout, bits in ((0xCC, ">B", 8), (0xCD, ">H", 16), (0xCE, ">I", 32))
        if value < 1 << bits
    )
    return bytes([code]) + struct.pack(layout, value)


def _array(tensor: torch.Tensor) -> bytes:
    data = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    inner = pack([list(tensor.shape), str(tensor.dtype).removeprefix("torch."), data])
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}.get(len(inner))
    head = bytes([fixed]) if fixed else _head(len(inner), None, (0xC7, 0xC8, 0xC9))
    assert math.prod(tensor.shape) * tensor.dtype.itemsize == len(data)
    return head + b"\x01" + inner


def _head(size: int, small: tuple[int, int] | None, codes: tuple[int | None, int, int]) -> bytes:
    if small and size < small[1]:
        return bytes([small[0] + size])
    sizes = zip(codes, (">B", ">H", ">I"), (8, 16, 32), strict=True)
    code, layout = next((code, layout) for code, layout, bits in sizes if code and size < 1 << bits)
    return bytes([code]) + struct.pack(layout, size)

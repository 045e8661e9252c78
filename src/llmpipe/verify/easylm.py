"""A plain forward in EasyLM's own convention: kernels as (in, out), rotary on interleaved pairs as complex numbers.

It is one side of the gate (design decision 5): no table, layout or rule of `checkpoint` is used, save what finds and
opens the containers. Source: github.com/young-geng/EasyLM, models/llama/llama_model.py. The frequencies are those of
rope_theta, as EasyLM's settings and its own export mean it; EasyLM's code computes with 10000 in their stead.

    B batch, T positions, C hidden, H query heads, K KV heads, D head size, F MLP rows, V vocabulary
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llmpipe.checkpoint.containers.inert_names import find
from llmpipe.checkpoint.containers.msgpack_file import StoredArray, read_msgpack
from llmpipe.checkpoint.containers.torch_file import read_inert
from llmpipe.checkpoint.easylm_files import metadata_of, split_prefix, weights_file
from llmpipe.errors import UserError

# Settings by the names of the card, and the words for them in llama_config and config.json.
_WORDS = {
    "query heads": ("num_attention_heads",),
    "KV heads": ("num_key_value_heads", "num_attention_heads"),
    "norm eps": ("rms_norm_eps",),
    "rope theta": ("rope_theta",),
    "longest sequence": ("max_position_embeddings", "max_sequence_length"),
}
_Values = dict[str, float | str]
_KERNELS = {
    "attention/wq", "attention/wk", "attention/wv", "attention/wo", "feed_forward/w1", "feed_forward/w2",
    "feed_forward/w3", "lm_head",
}  # fmt: skip
_NORMS = {"attention_norm", "ffn_norm", "transformer/ln_f"}


class EasyLMModel:
    """EasyLM's file as a model that runs block by block in fp32; only one block is in memory at a time.

    `said` is the user's word on settings, before the files'; `assumed` is used where the files say nothing, as those of
    EasyLM's converters do not. Both by the names of `hyper_parameters`.
    """

    kind = "EasyLM"

    def __init__(
        self,
        path: Path,
        rounded_to: torch.dtype | None = None,
        said: Mapping[str, float | str] | None = None,
        assumed: Mapping[str, float | str] | None = None,
    ):
        """`rounded_to`: the other side stores its weights in this type, so ours are rounded to it before use."""
        self.path, self.rounded_to = split_prefix(path)[1], rounded_to
        file = weights_file(self.path)
        if file is None:
            raise UserError(f"{path} is no file of EasyLM's, and no directory with one")
        self.arrays = _parameters(file)
        self._settings(_config(file), dict(said or {}), dict(assumed or {}))
        layers = {int(name.split("/")[2]) for name in self.arrays if name.startswith("transformer/h/")}
        self.num_layers = len(layers)
        if layers != set(range(self.num_layers)):
            raise UserError(f"{file} has the layers {sorted(layers)}, expected all from 0 on")
        self.hidden = self._array("transformer/wte/embedding").shape[1]
        self.head_dim = self.hidden // self.num_heads
        self.tied = self._is_tied({**(assumed or {}), **(said or {})}.get("tied embedding"))

    def names(self) -> list[str]:
        """Every parameter; a head that is asked to be the embedding, and is, is none."""
        return [name for name in self.arrays if not (self.tied and name == "lm_head/kernel")]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read."""
        return self._array(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in its stored type, kernels turned to (out, in) as other formats have them."""
        tensor = self.stored(name)
        kind = name.removesuffix("/kernel")
        kind = "/".join(kind.split("/")[3:]) if kind.startswith("transformer/h/") else kind
        if kind not in _KERNELS | _NORMS | {"transformer/wte/embedding"}:
            raise UserError(f"{self.path}: {name} is no tensor of EasyLM's Llama")
        return tensor.T.contiguous() if kind in _KERNELS else tensor

    def hyper_parameters(self) -> dict[str, float | str]:
        """What shapes the arithmetic, as these files or the user say it; what is assumed is left out."""
        heads = {"query heads", "KV heads"} <= self._known.keys()
        return {
            "layers": self.num_layers,
            "hidden size": self.hidden,
            "MLP rows": self._array("transformer/h/0/feed_forward/w1/kernel").shape[1],
            "vocabulary": self._array("transformer/wte/embedding").shape[0],
            "tied embedding": int(self.tied),
            "rope scaling": "default",  # the format has no other, and no window
            "window": "none",
            **({"head size": self.head_dim} if heads else {}),
            **self._known,
        }

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self._rounded(self.stored("transformer/wte/embedding")[tokens])

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""

        def weight(name: str) -> torch.Tensor:
            return self._weight(f"transformer/h/{layer}/{name}")

        x = self._norm(hidden, weight("attention_norm"))
        q = (x @ weight("attention/wq")).unflatten(-1, (self.num_heads, self.head_dim))  # (B, T, H, D)
        k = (x @ weight("attention/wk")).unflatten(-1, (self.num_kv_heads, self.head_dim))  # (B, T, K, D)
        v = (x @ weight("attention/wv")).unflatten(-1, (self.num_kv_heads, self.head_dim))
        turns = self._turns(positions)
        attended = _attend(_rotate(q, turns), _rotate(k, turns), v)  # (B, T, H, D)
        hidden = hidden + attended.flatten(-2) @ weight("attention/wo")
        x = self._norm(hidden, weight("ffn_norm"))
        x = F.silu(x @ weight("feed_forward/w1")) * (x @ weight("feed_forward/w3"))  # (B, T, F)
        return hidden + x @ weight("feed_forward/w2")

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        x = self._norm(hidden, self._weight("transformer/ln_f"))
        return x @ self._weight("lm_head") if "lm_head/kernel" in self.arrays else x @ self._embedding().T

    def _embedding(self) -> torch.Tensor:
        return self._rounded(self.stored("transformer/wte/embedding"))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def _turns(self, positions: torch.Tensor) -> torch.Tensor:
        """exp(i * position * frequency) of each pair: (B, T, 1, D / 2), complex."""
        frequencies = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = positions.float()[..., None, None] * frequencies
        return torch.polar(torch.ones_like(angles), angles)

    def _weight(self, name: str) -> torch.Tensor:
        return self._rounded(self.stored(f"{name}/kernel"))

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to(self.rounded_to) if self.rounded_to else tensor).float()

    def _array(self, name: str) -> StoredArray:
        if name not in self.arrays:
            raise UserError(f"{self.path} lacks {name}: the file is of another model, or was cut: copy it again")
        return self.arrays[name]

    def stored(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor, or rows of it, as it is stored, its pieces joined."""
        array = self._array(name)
        first, last, _ = rows.indices(array.shape[0])
        row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        start, stop, data = first * row_bytes, last * row_bytes, bytearray()
        with array.file.open("rb") as file:
            for offset, count in array.pieces:
                size = count * array.dtype.itemsize
                if stop > 0 and start < size:  # both are counted from the piece's beginning
                    file.seek(offset + max(start, 0))
                    data += file.read(min(stop, size) - max(start, 0))
                start, stop = start - size, stop - size
        return torch.frombuffer(data, dtype=array.dtype).view(last - first, *array.shape[1:])

    def _settings(self, config: dict[str, Any], said: _Values, assumed: _Values) -> None:
        """Head counts, eps and theta; `_known` are those that the user or the files say."""
        told = {
            name: next((config[word] for word in words if config.get(word) is not None), None)
            for name, words in _WORDS.items()
        }
        self._known = {name: value for name, value in told.items() if value is not None}
        self._known |= {name: said[name] for name in _WORDS if name in said}
        every = {**assumed, **self._known}
        missing = [name for name in _WORDS if name not in every and name != "longest sequence"]
        if missing:
            raise UserError(
                f"{self.path} does not say the {', '.join(missing)}, and no metadata.pkl lies beside it: name the"
                " model's shape"
            )
        self.num_heads, self.num_kv_heads = int(every["query heads"]), int(every["KV heads"])
        self.eps, self.theta = float(every["norm eps"]), float(every["rope theta"])

    def _is_tied(self, asked: float | str | None) -> bool:
        """Whether the head is the embedding's copy; EasyLM itself never ties them, so it is looked at if asked."""
        if not asked or "lm_head/kernel" not in self.arrays:
            return "lm_head/kernel" not in self.arrays
        return torch.equal(self.stored("lm_head/kernel").T, self.stored("transformer/wte/embedding"))


def holds_weights(path: Path) -> bool:
    """Whether a path is a file of EasyLM's, or a directory with one."""
    return weights_file(split_prefix(path)[1]) is not None


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours (x[2i], x[2i + 1]) as one complex number."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, T, H, D / 2)
    return torch.view_as_real(pairs * turns).flatten(-2)  # (B, T, H, D)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention with grouped queries, written out: q (B, T, H, D), k and v (B, T, K, D)."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # (B, T, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def _parameters(file: Path) -> dict[str, StoredArray]:
    """The model's arrays by their names within transformer and lm_head; a train state has more, which is not looked at.

    Keys are below params once (flax's variables) or twice (a train state's).
    """
    arrays = read_msgpack(file).arrays
    for below in ("params/params/", "params/", ""):
        found = {name[len(below) :]: array for name, array in arrays.items() if name.startswith(below)}
        if any(name.startswith("transformer/") for name in found):
            return {name: array for name, array in found.items() if not name.startswith(("step", "opt_state"))}
    raise UserError(f"{file} holds no transformer: it is not of EasyLM's Llama")


def _config(file: Path) -> dict[str, Any]:
    """llama_config of metadata.pkl, or config.json; nothing if neither is there. Older versions had no rope_theta."""
    for metadata in (metadata_of(file), file.with_name("metadata.pkl")):
        if metadata.is_file():
            found = read_inert(metadata.read_bytes(), metadata, find({}, True))
            config = found.get("llama_config") if isinstance(found, dict) else None
            return {"rope_theta": 1e4, **config} if isinstance(config, dict) else {}
    path = file.with_name("config.json")
    if not path.is_file():
        return {}
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", "default") != "default" or "type" in rope:
        raise UserError(f"{path}: the rotary embedding is scaled, which EasyLM does not have")
    return {"rope_theta": rope.get("rope_theta", 1e4), **config}

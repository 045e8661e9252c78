"""A plain forward in Meta's own convention, straight from `consolidated.*.pth` and `params.json`.

Mistral's own files are computed alike, but for what its params.json says more: the heads' size, and a window.
It is one side of the gate (design decision 5), so it shares nothing with `convert`: its own names, its own rule to join
the shards, rotary on interleaved pairs as complex numbers. Sources: the params.json and the shapes of the released
files; Touvron et al. 2023 (arXiv:2302.13971, 2307.09288); Su et al. 2021 (arXiv:2104.09864).

    B batch, T positions, C hidden, H query heads, K KV heads, D head size, F MLP rows, V vocabulary
"""

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from llmpipe.errors import UserError

# The dimension that Meta's model-parallel shards split; None is a copy in each. Embeddings: see `_join`.
_SPLIT = {
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
    "output": 0,
}
_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size", "head_dim", "hidden_dim",
    "sliding_window", "max_position_embeddings",
}  # fmt: skip


# Llama 3.1's scaling, as Meta's code has it; Llama 3.2's small models, told by their width, have another factor.
_LOW, _HIGH, _FIRST_LENGTH = 1.0, 4.0, 8192
_SMALL = (2048, 3072)


class MetaModel:
    """Meta's files as a model that runs block by block in fp32; only one block is in memory at a time."""

    kind = "Meta"

    def __init__(
        self, path: Path, rounded_to: torch.dtype | None = None, assumed: Mapping[str, float | str] | None = None
    ):
        """`rounded_to`: the other side stores its weights in this type, so ours are rounded to it before use.

        `assumed`: the other side's settings, for what Meta's files leave open: Llama 3.2's factor and tied head.
        """
        self.path, self.rounded_to = path, rounded_to
        self.params = _params(path / "params.json")
        self.shards = [_open(file) for file in sorted(path.glob("consolidated.*"))]
        if not self.shards:
            raise UserError(f"{path} has params.json but no consolidated.*.pth: put Meta's weight files beside it")
        self.num_layers: int = self.params["n_layers"]
        self.hidden: int = self.params["dim"]
        self.num_heads: int = self.params["n_heads"]
        self.num_kv_heads: int = self.params.get("n_kv_heads") or self.num_heads
        self.head_dim: int = self.params.get("head_dim") or self.hidden // self.num_heads
        self.window = int(self.params.get("sliding_window") or 0)
        self.eps: float = self.params.get("norm_eps", 1e-5)
        self.theta = float(self.params.get("rope_theta") or self._unsaid_theta(assumed or {}))
        self.factor = self._factor(assumed or {})
        self.tied = bool((assumed or {}).get("tied embedding")) and self._head_is_embedding()
        self._check_frequencies()

    def names(self) -> list[str]:
        """Every parameter; the frequencies that old files carry follow from theta, see `_check_frequencies`."""
        left_out = ("rope.freqs", "output.weight") if self.tied else ("rope.freqs",)
        return [name for name in self.shards[0] if name not in left_out]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read."""
        return self.shards[0][name].dtype

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in its stored type, the shards joined; UserError if a shard lacks it or copies differ."""
        return self._join(name, self._parts(name))

    def hyper_parameters(self) -> dict[str, float | str]:
        """What shapes the arithmetic, as these files say it."""
        return {
            "layers": self.num_layers,
            "hidden size": self.hidden,
            "query heads": self.num_heads,
            "KV heads": self.num_kv_heads,
            "head size": self.head_dim,
            "MLP rows": self._num_rows("layers.0.feed_forward.w1.weight"),
            "vocabulary": self._num_rows("tok_embeddings.weight"),
            "norm eps": self.eps,
            "rope theta": self.theta,
            "tied embedding": int(self.tied),
            "window": f"{self.window} from layer 0" if self.window else "none",
            "rope scaling": "llama3" if self.factor else "default",
            **self._scaling(),
        }

    def _num_rows(self, name: str) -> int:
        """Of the shards joined; nothing is read."""
        return len(self._join(name, [part.to("meta") for part in self._parts(name)]))

    def _parts(self, name: str) -> list[torch.Tensor]:
        """Of each shard, mapped into memory."""
        for number, shard in enumerate(self.shards):
            if name not in shard:
                raise UserError(f"{self.path}/consolidated.{number:02d}.pth lacks {name}: the download is incomplete")
        return [shard[name] for shard in self.shards]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self._rounded(self.read("tok_embeddings.weight")[tokens])

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""
        weight = {name: self._weight(f"layers.{layer}.{name}") for name in _SPLIT if name not in ("norm", "output")}
        heads, kv_heads = self.num_heads, self.num_kv_heads
        x = self._norm(hidden, weight["attention_norm"])
        q = F.linear(x, weight["attention.wq"]).unflatten(-1, (heads, self.head_dim))  # (B, T, H, D)
        k = F.linear(x, weight["attention.wk"]).unflatten(-1, (kv_heads, self.head_dim))  # (B, T, K, D)
        v = F.linear(x, weight["attention.wv"]).unflatten(-1, (kv_heads, self.head_dim))
        turns = self._turns(positions)
        attended = _attend(_rotate(q, turns), _rotate(k, turns), v, self.window)  # (B, T, H, D)
        hidden = hidden + F.linear(attended.flatten(-2), weight["attention.wo"])
        x = self._norm(hidden, weight["ffn_norm"])
        x = F.silu(F.linear(x, weight["feed_forward.w1"])) * F.linear(x, weight["feed_forward.w3"])  # (B, T, F)
        return hidden + F.linear(x, weight["feed_forward.w2"])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        head = "tok_embeddings" if self.tied else "output"
        return F.linear(self._norm(hidden, self._weight("norm")), self._weight(head))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def _turns(self, positions: torch.Tensor) -> torch.Tensor:
        """exp(i * position * frequency) of each pair: (B, T, 1, D / 2), complex."""
        angles = positions.float()[..., None, None] * self._frequencies()
        return torch.polar(torch.ones_like(angles), angles)

    def _frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, (D / 2,); Llama 3.1 slows long waves down and leaves short ones."""
        plain = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if not self.factor:
            return plain
        waves = 2 * math.pi / plain
        smooth = (_FIRST_LENGTH / waves - _LOW) / (_HIGH - _LOW)
        between = (1 - smooth) * plain / self.factor + smooth * plain
        slowed = torch.where(waves > _FIRST_LENGTH / _LOW, plain / self.factor, between)
        return torch.where(waves < _FIRST_LENGTH / _HIGH, plain, slowed)

    def _unsaid_theta(self, assumed: Mapping[str, float | str]) -> float:
        """Meta's code takes 1e4; of Mistral's files only those with a window, v0.1's, are known to mean that."""
        known = "hidden_dim" not in self.params or self.window
        return 1e4 if known else float(assumed.get("rope theta", 1e4))

    def _factor(self, assumed: Mapping[str, float | str]) -> float:
        """The rope scaling's factor, 0 without: 8 in Meta's code for Llama 3.1, not said for 3.2's small models."""
        if not self.params.get("use_scaled_rope"):
            return 0.0
        said = self.params.get("rope_scaling_factor")
        if said is None and self.hidden in _SMALL:
            said = assumed.get("rope factor")
        return float(said or 8)

    def _scaling(self) -> dict[str, float]:
        """Llama 3.1's settings by the names of transformers, which are the card's."""
        if not self.factor:
            return {}
        return {
            "rope factor": self.factor,
            "rope low_freq_factor": _LOW,
            "rope high_freq_factor": _HIGH,
            "rope original_max_position_embeddings": _FIRST_LENGTH,
        }

    def _head_is_embedding(self) -> bool:
        return "output.weight" not in self.shards[0] or torch.equal(
            self.read("output.weight"), self.read("tok_embeddings.weight")
        )

    def _check_frequencies(self) -> None:
        """Llama 1's and 2's files carry the frequencies: a second word on theta, in at least 8 bits."""
        stored = self.shards[0].get("rope.freqs")
        if stored is not None and not torch.allclose(stored.float(), self._frequencies(), rtol=1e-2):
            raise UserError(
                f"{self.path}: rope.freqs in consolidated.00.pth is not what rope_theta {self.theta:g} of params.json"
                " gives: put the params.json there that belongs to these weights"
            )

    def _weight(self, name: str) -> torch.Tensor:
        return self._rounded(self.read(f"{name}.weight"))

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to(self.rounded_to) if self.rounded_to else tensor).float()

    def _join(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """The shards of one tensor as one; Llama 1 and 2 split embeddings by columns, Llama 3 by rows."""
        kind = name.removesuffix(".weight")
        kind = kind.split(".", 2)[2] if kind.startswith("layers.") else kind
        if kind == "tok_embeddings":
            dim = 0 if parts[0].shape[1] == self.params["dim"] else 1
        elif kind in _SPLIT:
            dim = _SPLIT[kind]
        else:
            raise UserError(f"{self.path}: {name} is no tensor of Meta's Llama: expected {', '.join(_SPLIT)}")
        if dim is not None:
            return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
        if any(not torch.equal(part, parts[0]) for part in parts):
            raise UserError(
                f"{self.path}: the copies of {name} in the shards differ: the files are of different models"
            )
        return parts[0]


def _rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbours (x[2i], x[2i + 1]) as one complex number: Meta's interleaved rotary."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, T, H, D / 2)
    return torch.view_as_real(pairs * turns).flatten(-2)  # (B, T, H, D)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention with grouped queries, written out: q (B, T, H, D), k and v (B, T, K, D).

    window: a token sees itself and the window - 1 before it; 0: all before it.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # (B, T, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    every = torch.ones(scores.shape[-2:], dtype=torch.bool)
    unseen = every.triu(1) | every.tril(-window) if window else every.triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)


def _params(path: Path) -> dict[str, Any]:
    params = {key: value for key, value in json.loads(path.read_text()).items() if value is not None}
    if unknown := sorted(set(params) - _PARAMS):
        raise UserError(f"{path}: keys that the reference forward does not know: {', '.join(unknown)}")
    return params


def _open(path: Path) -> dict[str, torch.Tensor]:
    """One shard, mapped into memory, nothing but tensors unpickled."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read as a .pth of plain tensors: {error}") from error

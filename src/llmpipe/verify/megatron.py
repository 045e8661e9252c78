"""A plain forward over Megatron's rank files, in the convention of the fork that wrote them.

It is one side of the gate (design decision 5): no table, layout or rule of `checkpoint` is used, save the reader of
torch's zip files. The conventions are in megatron_weights.py.

    B batch, T positions, C hidden, H query heads, K KV heads, D head size, F MLP rows, V vocabulary
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from llmpipe.errors import UserError
from llmpipe.verify.megatron_dist import DistFiles
from llmpipe.verify.megatron_files import RankFiles, iteration_of
from llmpipe.verify.megatron_settings import Settings
from llmpipe.verify.megatron_weights import Weights


class MegatronModel:
    """Rank files as a model that runs block by block in fp32; only one block is in memory at a time.

    `said` is the user's word on settings, before the files'; `assumed` is used where the files say nothing, as they
    often do of the true vocabulary, eps, or the head counts. Both by the names of `hyper_parameters`.
    """

    kind = "Megatron"

    def __init__(
        self,
        path: Path,
        rounded_to: torch.dtype | None = None,
        said: Mapping[str, float | str] | None = None,
        assumed: Mapping[str, float | str] | None = None,
        old_permutation: bool = False,
    ):
        """`rounded_to`: the other side stores its weights in this type, so ours are rounded to it before use.

        `old_permutation`: Megatron-LLM's of before August 2023, which nothing in the files tells.
        """
        self.path, self.rounded_to = path, rounded_to
        files = DistFiles(path) if (iteration_of(path) / ".metadata").is_file() else RankFiles(path)
        self.weights = Weights(files)
        self.num_layers = self.weights.num_layers
        self.neighbours = self.weights.convention.neighbours and not old_permutation
        self.hidden = self.weights.sizes(None, "embedding.weight")[1]
        self.settings = Settings(path, self.weights.convention.name, files.args, said or {}, assumed or {})
        self.settings.read_heads(self.hidden)
        self.vocab = self.settings.vocab(files.tp * self.weights.sizes(None, "embedding.weight")[0])
        head = self.weights.places.get((None, "head.weight"), "word_embeddings_for_head")
        self.tied = head.startswith("word_embeddings_for_head") or self.settings.said_tied()
        self._names = self._list_names()

    def names(self) -> list[str]:
        """Every parameter, fused ones in parts; a tied head is none."""
        return list(self._names)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read. A norm that is stored less one is made in fp32."""
        layer, role, _ = self._names[name]
        return torch.float32 if self._less_one(role) else self.weights.dtype(layer, role)

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in its stored type, the ranks joined; UserError if copies differ."""
        return self._read(*self._names[name])

    def hyper_parameters(self) -> dict[str, float | str]:
        """What shapes the arithmetic, as these files or the user say it; what is assumed is left out."""
        sizes: dict[str, float | str] = {
            "layers": self.num_layers,
            "hidden size": self.hidden,
            "MLP rows": self.weights.sizes(0, "down.weight")[1] * self.weights.files.tp,
            "tied embedding": int(self.tied),
        }
        return sizes | self.settings.known()

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self._rounded(self._read(None, "embedding.weight")[tokens])

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""
        x = self._norm(hidden, layer, "norm 1")
        attended = self._attention(layer, x, positions)
        if self.weights.parallel:
            x = self._norm(hidden, layer, "mlp norm") if self.weights.has(layer, "mlp norm.weight") else x
            return hidden + attended + self._mlp(layer, x)
        hidden = hidden + attended
        return hidden + self._mlp(layer, self._norm(hidden, layer, "norm 2"))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        weight = self._read(None, "embedding.weight" if self.tied else "head.weight")
        if self.tied and self.weights.has(None, "head.weight"):
            self._check_copy(weight)
        return F.linear(self._norm(hidden, None, "norm"), self._rounded(weight))

    def trained_padding(self) -> list[str]:
        """The tables whose rows beyond the vocabulary are neither zeros nor copies of the last true row."""
        found = []
        for role in ("embedding.weight", "head.weight"):
            if self.weights.has(None, role):
                whole = self.weights.read(None, role)
                rows, last = whole[self.vocab :], whole[self.vocab - 1]
                found += [] if bool((rows == last).all()) or not bool(rows.any()) else [self.weights.places[None, role]]
        return found

    def _attention(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = self.settings.head_dim
        q, k, v = (self._linear(x, layer, "qkv", part).unflatten(-1, (-1, size)) for part in "qkv")  # (B, T, H or K, D)
        if self.weights.has(layer, "q norm.weight"):
            q, k = self._norm(q, layer, "q norm"), self._norm(k, layer, "k norm")
        angles = positions.float()[..., None, None] / self.settings.stretch * self.settings.frequencies()
        rotate = _rotate_neighbours if self.neighbours else _rotate_halves
        attended = _attend(rotate(q, angles), rotate(k, angles), v, self.settings.window)  # (B, T, H, D)
        return self._linear(attended.flatten(-2), layer, "dense")

    def _mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        if self.weights.gated:
            x = F.silu(self._linear(x, layer, "up", "gate")) * self._linear(x, layer, "up", "up")  # (B, T, F)
        else:
            x = F.gelu(self._linear(x, layer, "up"))
        return self._linear(x, layer, "down")

    def _linear(self, x: torch.Tensor, layer: int, role: str, part: str | None = None) -> torch.Tensor:
        weight = self._rounded(self._read(layer, f"{role}.weight", part))
        bias = f"{role}.bias"
        return F.linear(
            x, weight, self._rounded(self._read(layer, bias, part)) if self.weights.has(layer, bias) else None
        )

    def _norm(self, x: torch.Tensor, layer: int | None, role: str) -> torch.Tensor:
        """LayerNorm where there is a bias, else RMSNorm."""
        weight, eps = self._rounded(self._read(layer, f"{role}.weight")), self.settings.eps
        if self.weights.has(layer, f"{role}.bias"):
            return F.layer_norm(x, x.shape[-1:], weight, self._rounded(self._read(layer, f"{role}.bias")), eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def _read(self, layer: int | None, role: str, part: str | None = None) -> torch.Tensor:
        """A tensor, or a part of a fused one; the vocabulary's padding is cut off."""
        if layer is not None and part in ("gate", "up"):
            return self.weights.read_gated(layer, role, part)
        if layer is not None and part:
            queries = self.settings.num_heads // self.settings.num_kv_heads
            return self.weights.read_qkv(layer, role, "qkv".index(part), queries, self.settings.head_dim)
        tensor = self.weights.read(layer, role)
        if self._less_one(role):
            return tensor.float() + 1
        return tensor[: self.vocab] if role in ("embedding.weight", "head.weight") else tensor

    def _less_one(self, role: str) -> bool:
        """--apply-layernorm-1p: norms are stored less one."""
        return self.settings.less_one and "norm" in role and role.endswith("weight")

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to(self.rounded_to) if self.rounded_to else tensor).float()

    def _check_copy(self, embedding: torch.Tensor) -> None:
        """With pipeline stages the last one has a copy of the tied embedding."""
        if not torch.equal(self._read(None, "head.weight"), embedding):
            raise UserError(f"{self.path}: the last stage's copy of the tied embedding differs from the first stage's")

    def _list_names(self) -> dict[str, tuple[int | None, str, str | None]]:
        """Names for `read`, and what they are."""
        found: dict[str, tuple[int | None, str, str | None]] = {}
        for (layer, role), key in self.weights.places.items():
            parts: tuple[str | None, ...] = (None,)
            if role.startswith("qkv"):
                parts = tuple("qkv")
            elif role.startswith("up.") and self.weights.gated:
                parts = ("gate", "up")
            if not (role == "head.weight" and self.tied):
                found |= {f"{key} ({part})" if part else key: (layer, role, part) for part in parts}
        return found


def _rotate_neighbours(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[2i], x[2i + 1]) as one complex number: Meta's order."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, T, H, D / 2)
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)  # (B, T, H, D)


def _rotate_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + D / 2])."""
    real, imaginary = x.chunk(2, -1)  # (B, T, H, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), -1)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention with grouped queries, written out: q (B, T, H, D), k and v (B, T, K, D).

    A query sees the `window` last keys, itself among them, as transformers has it. (Megatron-LLM hands the number to
    flash attention as the distance, and so sees one more.)
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)  # (B, T, H, D)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    distance = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])  # (T, T)
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(unseen, float("-inf")).softmax(-1), v)

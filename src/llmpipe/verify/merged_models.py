"""The plain forwards with an adapter merged: each format's own tensors, changed where the adapter says so.

PEFT names Hugging Face's modules, so each class says which of those its tensors are, and which of their rows: query and
key rows lie as neighbours in some formats where Hugging Face has them half after half, and Falcon's q, k, v are fused.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch

from llmpipe.errors import UserError
from llmpipe.verify.easylm import EasyLMModel
from llmpipe.verify.hf import HfModel
from llmpipe.verify.hf_files import WeightFiles
from llmpipe.verify.inventory import layer_number
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.merged import HEAD, ROUNDING, Adapter
from llmpipe.verify.meta import MetaModel

# Meta's words, which EasyLM has too.
_META = {
    "attention_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
    "tok_embeddings": "model.embed_tokens",
    "wte": "model.embed_tokens",
    "norm": "model.norm",
    "ln_f": "model.norm",
    "output": "lm_head",
    "lm_head": "lm_head",
}
_MEGATRON = {
    "norm 1": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q norm": "self_attn.q_norm",
    "k norm": "self_attn.k_norm",
    "dense": "self_attn.o_proj",
    "norm 2": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
_FALCON = {
    "norm 1": "input_layernorm",
    "q": "self_attention.query_key_value",
    "k": "self_attention.query_key_value",
    "v": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "mlp norm": "ln_mlp",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
    "embedding": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
Place = tuple[str, torch.Tensor | None]
"""Hugging Face's name of a tensor, and which of its rows are ours; None: all, in order."""
_Values = Mapping[str, float | str]


class Merged(ABC):
    """What the four have in common; `_place_of` takes a name of `names()`."""

    adapter: Adapter

    @abstractmethod
    def _place_of(self, name: str) -> Place: ...

    @abstractmethod
    def read(self, name: str) -> torch.Tensor: ...

    def bounds(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The least and the most that a merged tensor may hold, whoever sums it; None if nothing was summed."""
        if not self.adapter.computes(self._place_of(name)[0]):
            return None
        with self.adapter.shifted(-ROUNDING):
            least = self.read(name)
        with self.adapter.shifted(ROUNDING):
            return least, self.read(name)

    def _check_fits(self, names: list[str]) -> None:
        """UserError if the adapter changes a tensor that the model does not have."""
        known = {self._place_of(name)[0] for name in names} | {HEAD}
        if unknown := [name for name in self.adapter.targets() if name not in known]:
            raise UserError(f"{self.adapter.path} changes {unknown[0]}, which the model does not have")


class _MergedFiles(WeightFiles):
    """A directory's tensors, merged; a head that comes apart from the embedding starts from it."""

    def __init__(self, path: Path, adapter: Adapter, embedding: str | None):
        """`embedding`: its name, where config.json says that the head is it."""
        super().__init__(path)
        self.adapter, self.embedding = adapter, embedding

    def names(self) -> list[str]:
        return super().names() + ([HEAD] if HEAD not in self.files and self.embedding else [])

    def read(self, name: str) -> torch.Tensor:
        return self.adapter.into(name, super().read(self._start(name)))

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(self._start(name))

    def shape(self, name: str) -> list[int]:
        return list(self.read(name).shape)

    def _start(self, name: str) -> str:
        return self.embedding if name == HEAD and self.embedding else name


class MergedHf(HfModel, Merged):
    """Hugging Face's."""

    def __init__(self, adapter: Adapter, path: Path, rounded_to: torch.dtype | None = None):
        super().__init__(path, rounded_to)
        self.adapter = adapter
        embedding, tied = f"{self.prefix}.{self._embedding}.weight", self.config.tie_word_embeddings
        self.files = _MergedFiles(path, adapter, embedding if tied else None)
        self.config.tie_word_embeddings = tied and adapter.keeps_tied(embedding, self.config.vocab_size)
        self.config.vocab_size = adapter.rows(embedding) or self.config.vocab_size
        self._check_fits(self.files.names())

    def _place_of(self, name: str) -> Place:
        return name.partition(":")[0], None


class MergedMeta(MetaModel, Merged):
    """Meta's."""

    def __init__(
        self, adapter: Adapter, path: Path, rounded_to: torch.dtype | None = None, assumed: _Values | None = None
    ):
        self.adapter = adapter
        super().__init__(path, rounded_to, assumed)
        self._check_fits(self.names())

    def hyper_parameters(self) -> dict[str, float | str]:
        found = super().hyper_parameters()
        return found | {"vocabulary": self.adapter.rows("model.embed_tokens.weight") or found["vocabulary"]}

    def read(self, name: str) -> torch.Tensor:
        whole = super().read(name)
        return whole if name == "rope.freqs" else _into(self.adapter, self._place_of(name), whole)

    def _place_of(self, name: str) -> Place:
        return _meta_place(name, self.num_heads, self.num_kv_heads, self.head_dim)


class MergedEasyLM(EasyLMModel, Merged):
    """EasyLM's, whose kernels are (in, out)."""

    def __init__(
        self,
        adapter: Adapter,
        path: Path,
        rounded_to: torch.dtype | None = None,
        said: _Values | None = None,
        assumed: _Values | None = None,
    ):
        self.adapter = adapter
        super().__init__(path, rounded_to, said, assumed)
        self._check_fits(self.names())

    def hyper_parameters(self) -> dict[str, float | str]:
        found = super().hyper_parameters()
        return found | {"vocabulary": self.adapter.rows("model.embed_tokens.weight") or found["vocabulary"]}

    def stored(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        whole = super().stored(name)
        if whole.ndim == 1 or name.endswith("embedding"):
            return _into(self.adapter, self._place_of(name), whole)[rows]
        return _into(self.adapter, self._place_of(name), whole.T).T[rows]

    def _place_of(self, name: str) -> Place:
        return _meta_place(name, self.num_heads, self.num_kv_heads, self.head_dim)


class MergedMegatron(MegatronModel, Merged):
    """Megatron's of any fork."""

    def __init__(
        self,
        adapter: Adapter,
        path: Path,
        rounded_to: torch.dtype | None = None,
        said: _Values | None = None,
        assumed: _Values | None = None,
        old_permutation: bool = False,
    ):
        self.adapter, self._own_rows = adapter, adapter.embedding_rows()
        if self._own_rows and assumed:  # the other side's is that of the adapter's table, which may be longer
            assumed = {name: value for name, value in assumed.items() if name != "vocabulary"}
        super().__init__(path, rounded_to, said, assumed, old_permutation)
        if self._own_rows and "vocabulary" not in self.settings.known():
            self.vocab = min(self.vocab, self._own_rows)
        if self.tied and not adapter.keeps_tied(self._place(None, "embedding.weight")[0], self.vocab):
            self._take_apart()
        self._check_fits(self.names())

    def hyper_parameters(self) -> dict[str, float | str]:
        found = super().hyper_parameters()
        return found | ({"vocabulary": self._own_rows} if self._own_rows else {})

    def _read(self, layer: int | None, role: str, part: str | None = None) -> torch.Tensor:
        return _into(self.adapter, self._place(layer, role, part), super()._read(layer, role, part))

    def _take_apart(self) -> None:
        """The head is no longer the embedding, but starts from it."""
        embedding = self.weights.places[None, "embedding.weight"]
        self.tied = False
        self.weights.places.setdefault((None, "head.weight"), embedding)
        names = {embedding: (None, "embedding.weight", None), "head (of its own)": (None, "head.weight", None)}
        self._names = {name: what for name, what in self._list_names().items() if what[1] != "head.weight"} | names

    def _place_of(self, name: str) -> Place:
        return self._place(*self._names[name])

    def _place(self, layer: int | None, role: str, part: str | None = None) -> Place:
        what, kind = role.rsplit(".", 1)
        module = (_FALCON if self.weights.parallel else _MEGATRON)[part or what]
        if self.weights.has(layer, "mlp norm.weight") and what == "norm 1":
            module = "ln_attn"
        if layer is not None:
            module = f"{'transformer.h' if self.weights.parallel else 'model.layers'}.{layer}.{module}"
        return f"{module}.{kind}", self._rows(part or what)

    def _rows(self, what: str) -> torch.Tensor | None:
        """Of q, k and v, and of the norms of their heads."""
        if what not in ("q", "k", "v", "q norm", "k norm"):
            return None
        dim, heads, kv_heads = self.settings.head_dim, self.settings.num_heads, self.settings.num_kv_heads
        if self.weights.parallel:
            groups = torch.arange((heads + 2 * kv_heads) * dim).view(kv_heads, -1, dim)  # (K, H/K + 2, D)
            rows = {"q": groups[:, :-2], "k": groups[:, -2], "v": groups[:, -1]}[what].flatten()
        else:
            rows = torch.arange({"q": heads, "k": kv_heads, "v": kv_heads}.get(what, 1) * dim)
        return rows[neighbours(len(rows), dim)] if self.neighbours and what != "v" else rows


def neighbours(rows: int, head_dim: int) -> torch.Tensor:
    """Which of the half-split rows each is that stands beside its partner, head by head."""
    return torch.arange(rows).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()


def _into(adapter: Adapter, place: Place, weight: torch.Tensor) -> torch.Tensor:
    return adapter.into(place[0], weight, place[1])


def _meta_place(name: str, num_heads: int, num_kv_heads: int, head_dim: int) -> Place:
    """Of a tensor of Meta's or EasyLM's."""
    word, layer = re.split(r"[./]", name)[-2], layer_number(name)
    heads = {"wq": num_heads, "wk": num_kv_heads}.get(word)
    rows = neighbours(heads * head_dim, head_dim) if heads else None
    return f"model.layers.{layer}.{_META[word]}.weight" if layer is not None else f"{_META[word]}.weight", rows

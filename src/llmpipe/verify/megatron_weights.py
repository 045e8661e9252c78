"""The weights in Megatron's rank files by what they are, whatever fork wrote them, for the plain forward.

Each fork's convention, from its own model code and from what its converters write (docs/proof):

    fork                     rows of query_key_value             rotary pairs       MLP           head
    epfLLM/Megatron-LLM      per KV group: queries, key, value   (2i, 2i + 1)       [up; gate]    lm_head
    NVIDIA/Megatron-LM       the same                            (i, i + D / 2)     [gate; up]    output_layer
    alibaba/Megatron-LLaMA   per rank: all q, all k, all v       (i, i + D / 2)     [gate; up]    lm_head, whole
    MinfanZhao/Megatron-LM_  per head: query, key, value         (2i, 2i + 1)       [gate; up]    output_layer
"""

import re
from dataclasses import dataclass, replace

import torch

from llmpipe.errors import UserError
from llmpipe.verify.megatron_dist import DistFiles
from llmpipe.verify.megatron_files import RankFiles


@dataclass(frozen=True, slots=True)
class Convention:
    """What tells one fork's weights from another's."""

    name: str
    blocks: bool = False
    """A rank's query, key and value rows are three blocks; else they lie group by group."""
    neighbours: bool = False
    """Rotary turns dimensions (2i, 2i + 1); else (i, i + D / 2)."""
    up_first: bool = False
    copied_head: bool = False
    """Every TP rank has the whole head."""


MEGATRON_LLM = Convention("Megatron-LLM", neighbours=True, up_first=True)
MEGATRON_LM = Convention("Megatron-LM")
ALIBABA = Convention("alibaba's Megatron-LLaMA", blocks=True, copied_head=True)
MINFANZHAO = Convention("MinfanZhao's Megatron-LLaMA", neighbours=True)

# What a tensor is, by its name in any of the forks, without "weight" or "bias".
_IN_LAYER = {
    "norm 1": ("input_layernorm", "input_norm", "input_rmsnorm", "self_attention.linear_qkv.layer_norm"),
    "qkv": ("attention.query_key_value", "self_attention.query_key_value", "self_attention.linear_qkv"),
    "q norm": ("self_attention.q_layernorm",),
    "k norm": ("self_attention.k_layernorm",),
    "dense": ("attention.dense", "self_attention.dense", "self_attention.linear_proj"),
    "norm 2": (
        "post_attention_layernorm", "post_attention_norm", "post_attention_rmsnorm", "pre_mlp_layernorm",
        "mlp.linear_fc1.layer_norm",
    ),
    "mlp norm": ("mlp_layernorm",),
    "up": ("mlp.dense_h_to_4h", "mlp.linear_fc1"),
    "down": ("mlp.dense_4h_to_h", "mlp.linear_fc2"),
}  # fmt: skip
_OUTSIDE = {
    "embedding": ("embedding.word_embeddings",),
    "norm": ("final_layernorm", "final_norm", "final_rmsnorm"),
    "head": ("lm_head", "output_layer", "word_embeddings_for_head"),
}
_KEY = re.compile(r"(?:language_model\.)?(?:(?:encoder|decoder|transformer)\.)?(?:layers\.(\d+)\.)?(.+)")
_NAME = re.compile(r"(.+?)(?:[._](weight|bias))?")
# What TP splits by columns, and what every rank has whole; the rest is split by rows.
_COLUMNS = ("dense.weight", "down.weight")
_COPIED = ("norm", "dense.bias", "down.bias")


class Weights:
    """The tensors by layer and role ("dense.weight"), the ranks joined, fused ones in parts."""

    def __init__(self, files: RankFiles | DistFiles):
        self.files, self.path = files, files.directory
        self.convention = _convention(files)
        self.places: dict[tuple[int | None, str], str] = {}
        for key in files.tensors:
            if (place := self._place(key)) in self.places:
                raise UserError(f"{self.path}: {key} and {self.places[place]} are one tensor: expected one of them")
            self.places[place] = key
        self.num_layers = 1 + max((layer for layer, _ in self.places if layer is not None), default=-1)
        self._check_layers()
        self.parallel = not self.has(0, "norm 2.weight")
        """Attention and MLP side by side: Falcon."""
        self.gated = self.sizes(0, "up.weight")[0] == 2 * self.sizes(0, "down.weight")[1]

    def has(self, layer: int | None, role: str) -> bool:
        return (layer, role) in self.places

    def sizes(self, layer: int | None, role: str) -> tuple[int, ...]:
        """Of one rank's part."""
        if not self.has(layer, role):
            raise UserError(f"{self.path} lacks {role} of {'the model' if layer is None else f'layer {layer}'}")
        return self.files.tensors[self.places[layer, role]][0].shape

    def dtype(self, layer: int | None, role: str) -> torch.dtype:
        return self.files.tensors[self.places[layer, role]][0].dtype

    def read(self, layer: int | None, role: str) -> torch.Tensor:
        """A whole tensor as it is stored."""
        ranks = self.files.read(self.places[layer, role])
        if any(word in role for word in _COPIED) or (role == "head.weight" and self.convention.copied_head):
            if any(not torch.equal(rank, ranks[0]) for rank in ranks):
                key = self.places[layer, role]
                raise UserError(f"{self.path}: the ranks' copies of {key} differ: the files are of different models")
            return ranks[0]
        return torch.cat(ranks, 1 if role in _COLUMNS else 0)

    def read_qkv(self, layer: int, role: str, which: int, num_queries: int, head_dim: int) -> torch.Tensor:
        """The query (0), key (1) or value (2) rows of all heads; `num_queries` per KV head."""
        parts = []
        for rank in self.files.read(self.places[layer, role]):
            if self.convention.blocks:
                parts.append(rank.chunk(3)[which])
                continue
            groups = rank.unflatten(0, (-1, num_queries + 2, head_dim))  # (groups, queries + 2, D, ...)
            of_group = (groups[:, :num_queries], groups[:, num_queries, None], groups[:, num_queries + 1, None])
            parts.append(of_group[which].flatten(0, 2))
        return torch.cat(parts)

    def read_gated(self, layer: int, role: str, part: str) -> torch.Tensor:
        """The gate's or the up projection's rows: each rank holds its own of both."""
        second = (part == "up") != self.convention.up_first
        return torch.cat([rank.chunk(2)[int(second)] for rank in self.files.read(self.places[layer, role])])

    def _place(self, key: str) -> tuple[int | None, str]:
        """The layer and the role of a tensor of any of the forks."""
        found = _KEY.fullmatch(key)
        layer, rest = (int(found[1]) if found[1] else None, found[2]) if found else (None, key)
        named = _NAME.fullmatch(rest)
        name, kind = (named[1], named[2] or "weight") if named else (rest, "weight")
        roles = _OUTSIDE if layer is None else _IN_LAYER
        role = next((role for role, names in roles.items() if name in names), None)
        if role is None:
            raise UserError(f"{self.path}: {key} is no tensor of a Megatron model that the reference forward knows")
        return layer, f"{role}.{kind}"

    def _check_layers(self) -> None:
        wanted = {role for layer, role in self.places if layer == 0}
        for layer in range(self.num_layers):
            if unlike := wanted ^ {role for number, role in self.places if number == layer}:
                raise UserError(f"{self.path}: layers 0 and {layer} do not hold the same: {', '.join(sorted(unlike))}")
        for role in ("embedding.weight", "norm.weight"):
            self.sizes(None, role)
        for role in ("norm 1.weight", "qkv.weight", "dense.weight", "up.weight", "down.weight"):
            self.sizes(0, role)


def _convention(files: RankFiles | DistFiles) -> Convention:
    """Whose files these are, by names that only one fork gives, and which rotary pairs its arguments ask for."""
    keys, args = files.tensors, files.args
    if any("rmsnorm" in key for key in keys):
        return replace(MINFANZHAO, neighbours=args.get("rope_style", "llama") == "llama")
    if "lm_head.weight" in keys or "causal_lm" in args:  # without --causal-lm its head is Megatron-LM's
        return replace(ALIBABA, copied_head="lm_head.weight" in keys)
    if "language_model.lm_head" in keys or "num_attention_heads_kv" in args or "glu_activation" in args:
        return MEGATRON_LLM
    if any(key.startswith("decoder.") or "output_layer" in key for key in keys) or "normalization" in args:
        return replace(MEGATRON_LM, neighbours=bool(args.get("rotary_interleaved")))
    raise UserError(f"{files.directory}: the names of the tensors are of no known fork of Megatron")

"""What tells one fork of Megatron from another in its files, as data: names, order of rows, what is padded or split.

All forks share the rest: root/latest_checkpointed_iteration.txt names root/{release|iter_NNNNNNN}, which has a folder
mp_rank_TT[_PPP] for each rank, which has model_optim_rng.pt, a pickled table with `model` (or model0, model1 ... of
virtual stages) of that rank's tensors, layers numbered from 0 in each stage, and `args`, the training arguments.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from llmpipe.families import Shape
from llmpipe.layout import Stages

QKV = "layers.{}.attention.qkv"
"""In `Dialect.names`: the tensor that holds q, k and v, where they are fused; add .weight or .bias."""
GATE_UP = "layers.{}.mlp.gate_up"
"""The tensor that holds gate and up; a family without a gate has its layers.{}.mlp.up.weight alone."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a written checkpoint's args have to say beside the model's shape."""

    tp: int
    stages: Stages
    dtype: torch.dtype
    padded_vocab: int
    vocab_multiple: int
    """make_vocab_size_divisible_by: the padded vocabulary is a multiple of it times tp."""

    @property
    def pp(self) -> int:
        return self.stages.pp

    @property
    def vp(self) -> int:
        return self.stages.vp


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One fork's files, or one kind of model of it."""

    name: str
    """What --dialect and --source-dialect say."""
    system: str
    """For messages: whose files they are."""
    names: Mapping[str, str]
    """Our generic names ({} is the layer) → the names below `model`, dotted. Fused tensors: see QKV and GATE_UP."""
    family_names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By family: names that are others there than in `names`."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Patterns and their replacements (re.sub), applied in turn to the names found: other versions' spellings."""
    ignored: str = r"(^|\.)(_extra_state|inv_freq)$"
    """A pattern (re.search) of names found that hold no weights: Transformer Engine's state, rotary buffers."""
    marks: tuple[str, ...]
    """Patterns (re.search) of names as found: each matches one in this dialect's files."""
    unlike: tuple[str, ...] = ()
    """Patterns of names that are in other dialects' files only."""
    args_marks: tuple[str, ...] = ()
    """Arguments that only this fork has: they decide where names leave more than one dialect."""
    families: tuple[str, ...]
    """The families that its models can be of."""
    qkv: Literal["grouped", "blocks"] = "grouped"
    """grouped: KV head by KV head, its query heads, K, V. blocks: all of the rank's q, all its k, all its v."""
    interleaved: bool = False
    """Whether the rows of q and k are in interleaved rotary order (Meta's) instead of half after half."""
    gate_first: bool = True
    """Whether gate stands above up."""
    padding: Literal["last", "zeros"] = "last"
    """What the rows beyond the true vocabulary are: copies of the last true one, or zeros."""
    whole_head: bool = False
    """Whether each rank of the last stage has the whole head, padded (read: or in true rows), instead of a part."""
    tied_head: str | None = None
    """The name of the embedding's copy on the last of several stages, where the head is tied."""
    tables: tuple[str, ...] = ()
    """Dotted names that are tables within tables; what stands in one is named by the rest, dots and all."""
    empty: tuple[str, ...] = ()
    """Names that are written for each layer with None in them: states that a strict load asks for."""
    outer: Mapping[str, Any] = field(default_factory=lambda: {"checkpoint_version": 3.0})
    """What stands beside `model` and `args` in a written file."""
    folder: str = "release"
    """The folder that is written; iter_NNNNNNN's number, or its name, is in latest_checkpointed_iteration.txt."""
    read_args: Callable[[Namespace | None], dict[str, Any]]
    """Fields of `Shape` that a file's args say; None: it has none.

    What the args leave open is left out, and comes from --shape; what the fork's code has fixed belongs in. "vocab" is
    the true one. Two entries are not `Shape`'s: "layernorm_1p": norms' weights lack 1; "interleaved": goes before the
    field above. UserError for what the decoder does not compute.
    """
    uncertain: tuple[str, ...] = ()
    """Of rope_theta, rope_scaling, norm_eps: those that args leave at defaults that were never meant; --shape wins."""
    write_args: Callable[[Shape, Written], Namespace | None]
    """The args of a written file; UserError, or a warning in the log, for what the fork does not compute."""
    by_name_only: bool = False
    """Whether it is never detected, and never written."""

    def __repr__(self) -> str:
        return f"Dialect({self.name})"

    def stored_name(self, key: str, family: str) -> str | None:
        """The name below `model` for one of our generic names; None if the dialect has no such tensor."""
        return self.family_names.get(family, {}).get(key, self.names.get(key))


def fields_of(args: Namespace | None) -> dict[str, Any]:
    """The arguments by name; none for None."""
    return {} if args is None else dict(vars(args))

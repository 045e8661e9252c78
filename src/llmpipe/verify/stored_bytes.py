"""Every tensor of a source as its files hold it, with the place that convert's writer of that format gives to it.

The bytes come from the reference's own readers; names, order of rows and splits from what `convert --to` writes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch

from llmpipe.checkpoint import easylm, meta_write
from llmpipe.checkpoint.layouts import Stored, hf_layout
from llmpipe.checkpoint.megatron.dialect import Dialect
from llmpipe.checkpoint.megatron.dialects import DIALECTS
from llmpipe.checkpoint.megatron.layout import Grid, Place, check_split, rank_layout
from llmpipe.families import FAMILIES, ONE_STAGE, Shape
from llmpipe.verify.easylm import EasyLMModel
from llmpipe.verify.hf import HfModel
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.megatron_weights import ALIBABA, MEGATRON_LLM, MINFANZHAO
from llmpipe.verify.meta import MetaModel

Reference = HfModel | MetaModel | MegatronModel | EasyLMModel
"""A source, opened by the plain forward of its format."""

_DIALECTS = {MEGATRON_LLM.name: "epf", ALIBABA.name: "ali", MINFANZHAO.name: "mfz"}
# What files carry beside the weights, and what follows from the settings.
_DERIVED = re.compile(r"rope\.freqs|.*\binv_freq|.*\b_extra_state")


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """One tensor of one file."""

    name: str
    """With its file, where several hold the name."""
    shape: tuple[int, ...]
    read: Callable[[slice], torch.Tensor]
    """Rows of it as they are stored."""
    laid_out: Stored | None
    """Where the writer would take it from; None if it would write no such tensor."""


def stored_tensors(source: Reference, shape: Shape) -> Iterator[StoredBytes]:
    """All of a source's, but for what follows from settings; `shape` is the model's, with the source's vocabulary."""
    if isinstance(source, HfModel):
        found = _hf(source, shape)
    elif isinstance(source, MetaModel):
        found = _meta(source, shape)
    elif isinstance(source, EasyLMModel):
        layout = {stored.name: stored for stored in easylm.layout(shape)}
        found = (
            StoredBytes(name, array.shape, partial(source.stored, name), layout.get(name))
            for name, array in source.arrays.items()
        )
    else:
        found = _megatron(source, shape)
    return (each for each in found if not _DERIVED.fullmatch(each.name))


def _hf(source: HfModel, shape: Shape) -> Iterator[StoredBytes]:
    layout = {stored.name: stored for stored in hf_layout(FAMILIES[shape.family], shape)}
    tied = _copy_of_embedding(layout, "lm_head.weight", shape)
    for name in source.files.names():
        tensor = partial(_rows_of, partial(source.files.read, name))
        yield StoredBytes(name, tuple(source.files.shape(name)), tensor, layout.get(name, tied.get(name)))


def _meta(source: MetaModel, shape: Shape) -> Iterator[StoredBytes]:
    first = source.shards[0]
    ends = list(accumulate(len(shard["output.weight"]) for shard in source.shards if "output.weight" in shard))
    vocab = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    by_rows = first["tok_embeddings.weight"].shape[1] == source.hidden
    layouts = meta_write.layout(shape, len(source.shards), by_rows, vocab or None)
    for shard, (file, tensors) in zip(source.shards, layouts.items(), strict=True):
        layout = {stored.name: stored for stored in tensors}
        for name, tensor in shard.items():
            label = name if len(source.shards) == 1 or _DERIVED.fullmatch(name) else f"{name} in {file}"
            yield StoredBytes(label, tuple(tensor.shape), tensor.__getitem__, layout.get(name))


def _megatron(source: MegatronModel, shape: Shape) -> Iterator[StoredBytes]:
    """Stages are joined: layers have their global numbers, and only a tied head is there twice."""
    files, weights = source.weights.files, source.weights
    legacy = any(key.startswith("language_model.") for key in files.tensors)
    dialect = DIALECTS[_DIALECTS.get(weights.convention.name, "legacy" if legacy else "mcore")]
    head = weights.sizes(None, "head.weight")[0] if weights.convention.copied_head else None
    padded = weights.sizes(None, "embedding.weight")[0] * files.tp
    grid = Grid(files.tp, ONE_STAGE, padded, source.neighbours, head)
    check_split(dialect, shape, grid)
    for rank in range(files.tp):
        layout = {placed.stored.name: placed.stored for placed in rank_layout(dialect, shape, grid, Place(rank, 0))}
        layout |= _copy_of_embedding(layout, dialect.tied_head, shape)
        for key, ranks in files.tensors.items():
            read = partial(_rank_rows, source, key, rank)
            label = key if files.tp == 1 or _DERIVED.fullmatch(key) else f"{key} of tp {rank}"
            yield StoredBytes(label, ranks[rank].shape, read, layout.get(_written_name(key, dialect)))


def _rank_rows(source: MegatronModel, key: str, rank: int, rows: slice) -> torch.Tensor:
    """Of a rank's tensor; a norm that is stored less one is made whole, which cannot be undone to the bit."""
    tensor = source.weights.files.read(key, rows)[rank]
    return tensor.float() + 1 if source.settings.less_one and re.search(r"norm[._]weight$", key) else tensor


def _written_name(key: str, dialect: Dialect) -> str:
    """The name as it is written, of other versions' spellings, too."""
    for pattern, replacement in dialect.aliases:
        key = re.sub(pattern, replacement, key)
    return key


def _copy_of_embedding(layout: dict[str, Stored], name: str | None, shape: Shape) -> dict[str, Stored]:
    """A head that is the embedding, where files hold it all the same."""
    if not shape.tie_embeddings or name is None:
        return {}
    embedding = next(stored for stored in layout.values() if stored.parts[0].key == "embedding.weight")
    return {name: replace(embedding, name=name)}


def _rows_of(read: Callable[[], torch.Tensor], rows: slice) -> torch.Tensor:
    """Of a tensor that is mapped into memory."""
    return read()[rows]

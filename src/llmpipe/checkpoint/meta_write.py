"""Meta's own format, written: consolidated.NN.pth, one file for each model-parallel rank, and params.json.

As Meta's own tool writes it (docs/proof/meta.json): wq, wk, wv, w1, w3 and output are split by rows, wo and w2 by
columns, the embedding by columns (Llama 1 and 2) or by rows (3), norms are whole in each file; wq and wk are in
interleaved rotary order. Rows of a vocabulary that the number of files does not divide: the last file has fewer. A
head that is the embedding is written as a tensor of its own, as in Llama 3.2's release; rope.freqs, which follows from
params.json and which Meta's code does not read, is left out.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from llmpipe.checkpoint import meta_params, tokenizer_files
from llmpipe.checkpoint.layouts import Stored, clip_rows, head_rows, piece
from llmpipe.checkpoint.mover import Filled, Mover
from llmpipe.checkpoint.source import Slices, TensorSource, sizes_of
from llmpipe.checkpoint.torch_write import write_torch_files
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, Tensor, layer_of
from llmpipe.files import sha256, write_json
from llmpipe.layout import chunk
from llmpipe.progress import progress

_OUTSIDE = {"embedding": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight"}
_LAYER = {
    "attention_norm": "attention_norm",
    "attention.q": "attention.wq",
    "attention.k": "attention.wk",
    "attention.v": "attention.wv",
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
_INTERLEAVED = ("attention.q.weight", "attention.k.weight")


def write(
    mover: Mover, directory: Path, tp: int = 1, dtype: torch.dtype | None = None, by_rows: bool | None = None
) -> dict[str, str | None]:
    """Fill a directory with a source as `tp` of Meta's files, params.json and the tokenizer's; returns their SHA-256.

    `dtype` None keeps each tensor's stored type; `by_rows`: see `layout`. UserError for what Meta's format cannot say.
    """
    shape = mover.source.shape
    by_rows = meta_params.by_rows(shape) if by_rows is None else by_rows
    params = meta_params.to_params(shape, by_rows)
    check_split(shape, tp)
    write_json(directory / "params.json", params)
    hashes: dict[str, str | None] = {**tokenizer_files.carry(mover.source, directory)}
    hashes["params.json"] = sha256(directory / "params.json")
    files = targets(mover.source, tp, dtype, by_rows)
    trees = {name: {filled.stored.name: filled for filled in tensors} for name, tensors in files.items()}
    with progress("convert", sum(filled.bytes for tensors in files.values() for filled in tensors), "B") as shown:
        return hashes | write_torch_files(mover, directory, trees, shown)


def targets(
    source: TensorSource, tp: int = 1, dtype: torch.dtype | None = None, by_rows: bool | None = None
) -> dict[str, list[Filled]]:
    """Each file and its tensors; UserError if Meta's format cannot say what the model has, or be split so."""
    meta_params.check(source.shape)
    check_split(source.shape, tp)
    files = layout(source.shape, tp, by_rows)
    return {
        name: [Filled(each, dtype or source.dtype(each.parts[0].key)) for each in tensors]
        for name, tensors in files.items()
    }


def file_name(rank: int) -> str:
    """The name of a model-parallel rank's file."""
    return f"consolidated.{rank:02d}.pth"


def layout(
    shape: Shape, tp: int, by_rows: bool | None = None, vocab: list[slice] | None = None
) -> dict[str, list[Stored]]:
    """What each file holds; `by_rows`: the embedding is split so (None: as the vocabulary's size says).

    Reading shares it: `check_split` says what Meta's code can use of it; `vocab` are each file's rows of the head where
    they are not as Meta's tool cuts them (others' tools give the rows that do not divide to the last file).
    """
    by_rows = meta_params.by_rows(shape) if by_rows is None else by_rows
    vocab = vocab or [chunk(shape.vocab, tp, rank) for rank in range(tp)]
    return {file_name(rank): list(_rank(shape, tp, rank, by_rows, vocab[rank])) for rank in range(tp)}


def _rank(shape: Shape, tp: int, rank: int, by_rows: bool, vocab: slice) -> Iterator[Stored]:
    """One file's tensors."""
    for key, row in FAMILIES[shape.family].keys(shape).items():
        name, slices = meta_name(key), _slices(shape, row, tp, rank, vocab)
        if key == "embedding.weight":
            columns = (slice(0, shape.vocab), chunk(shape.hidden, tp, rank))
            yield piece(name, key, slices if by_rows else columns)
            if shape.tie_embeddings:
                yield piece(_OUTSIDE["head"], key, slices)
        elif key.endswith(_INTERLEAVED):
            yield _interleaved(name, key, slices, shape.head_dim)
        else:
            yield piece(name, key, slices)


def _slices(shape: Shape, row: Tensor, tp: int, rank: int, vocab: slice) -> Slices:
    """A file's part of one of our tensors; unlike a rank's, of KV heads fewer than files too."""
    slices = [slice(0, size) for size in row.shape(shape)]
    if row.shard_dim is not None:
        size = slices[row.shard_dim].stop
        slices[row.shard_dim] = vocab if row.dims[row.shard_dim] == "vocab" else chunk(size, tp, rank)
    return tuple(slices)


def _interleaved(name: str, key: str, slices: Slices, head_dim: int) -> Stored:
    """Rows of the whole tensor, each head's in interleaved rotary order; more files than KV heads cut heads."""
    rows, columns = slices
    heads = range(rows.start // head_dim, -(-rows.stop // head_dim))
    first = heads.start * head_dim
    parts = head_rows(key, heads, head_dim, columns.stop, first, interleaved=True)
    return Stored(name, sizes_of(slices), clip_rows(parts, rows.start, rows.stop))


def split_dims(shape: Shape, by_rows: bool) -> dict[str, int | None]:
    """The dimension that the files split of each of Meta's tensors; None: whole in each."""
    rows = FAMILIES[shape.family].keys(shape)
    dims = {meta_name(key): row.shard_dim for key, row in rows.items()}
    return dims | {_OUTSIDE["embedding"]: 0 if by_rows else 1, _OUTSIDE["head"]: 0}


def meta_name(key: str) -> str:
    """Meta's name for one of ours."""
    layer = layer_of(key)
    if layer is None:
        return _OUTSIDE[key.removesuffix(".weight")]
    return f"layers.{layer}.{_LAYER[key.split('.', 2)[2].removesuffix('.weight')]}.weight"


def check_split(shape: Shape, tp: int) -> None:
    """UserError unless whole heads go to each file, as Meta's code expects."""
    fits = [
        n for n in range(1, shape.num_kv_heads + 1) if not (shape.num_kv_heads % n or shape.hidden % n or shape.ffn % n)
    ]
    if tp not in fits:
        raise UserError(
            f"--tp {tp}: Meta's files share {shape.num_kv_heads} KV heads, {shape.hidden} columns and the MLP's"
            f" {shape.ffn} rows evenly: tp has to be one of {fits}"
        )

"""Meta's own format, written: consolidated.NN.pth, one file for each model-parallel rank, and params.json.

As Meta's own tool writes it (docs/proof/meta.json): wq, wk, wv, w1, w3 and output are split by rows, wo and w2 by
columns, the embedding by columns (Llama 1 and 2) or by rows (3), norms are whole in each file; wq and wk are in
interleaved rotary order. Rows of a vocabulary that the number of files does not divide: the last file has fewer. A
head that is the embedding is written as a tensor of its own, as in Llama 3.2's release; rope.freqs, which follows from
params.json and which Meta's code does not read, is left out.
"""

from collections.abc import Iterator

from llmpipe.checkpoint import meta_params
from llmpipe.checkpoint.layouts import Stored, head_rows, piece
from llmpipe.checkpoint.source import Slices, sizes_of
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, layer_of
from llmpipe.layout import chunk

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


def file_name(rank: int) -> str:
    """The name of a model-parallel rank's file."""
    return f"consolidated.{rank:02d}.pth"


def layout(shape: Shape, tp: int, by_rows: bool | None = None) -> dict[str, list[Stored]]:
    """What each file holds; `by_rows`: the embedding is split so (None: as the vocabulary's size says).

    UserError if the model cannot be split over tp files.
    """
    _check_split(shape, tp)
    by_rows = meta_params.by_rows(shape) if by_rows is None else by_rows
    return {file_name(rank): list(_rank(shape, tp, rank, by_rows)) for rank in range(tp)}


def _rank(shape: Shape, tp: int, rank: int, by_rows: bool) -> Iterator[Stored]:
    """One file's tensors."""
    for key, row in FAMILIES[shape.family].keys(shape).items():
        slices = row.slices(shape, tp, rank)
        name = meta_name(key)
        if key == "embedding.weight":
            columns = (slice(0, shape.vocab), chunk(shape.hidden, tp, rank))
            yield piece(name, key, slices if by_rows else columns)
            if shape.tie_embeddings:
                yield piece(_OUTSIDE["head"], key, slices)
        elif key.endswith(_INTERLEAVED):
            yield _interleaved(name, key, slices, shape.head_dim)
        else:
            yield piece(name, key, slices)


def _interleaved(name: str, key: str, slices: Slices, head_dim: int) -> Stored:
    """The rows of whole heads, each head's in interleaved rotary order."""
    rows, columns = slices
    heads = range(rows.start // head_dim, rows.stop // head_dim)
    parts = head_rows(key, heads, head_dim, columns.stop, 0, interleaved=True)
    return Stored(name, sizes_of(slices), tuple(parts))


def meta_name(key: str) -> str:
    """Meta's name for one of ours."""
    layer = layer_of(key)
    if layer is None:
        return _OUTSIDE[key.removesuffix(".weight")]
    return f"layers.{layer}.{_LAYER[key.split('.', 2)[2].removesuffix('.weight')]}.weight"


def _check_split(shape: Shape, tp: int) -> None:
    """UserError unless whole heads go to each file, as Meta's code expects."""
    fits = [
        n for n in range(1, shape.num_kv_heads + 1) if not (shape.num_kv_heads % n or shape.hidden % n or shape.ffn % n)
    ]
    if tp not in fits:
        raise UserError(
            f"--tp {tp}: Meta's files share {shape.num_kv_heads} KV heads, {shape.hidden} columns and the MLP's"
            f" {shape.ffn} rows evenly: tp has to be one of {fits}"
        )

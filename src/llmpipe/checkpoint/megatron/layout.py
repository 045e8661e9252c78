"""Which of our tensors lie where in each rank's tensors, for any dialect: readers and writers share it."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmpipe.checkpoint.layouts import Part, Stored, head_rows, piece
from llmpipe.checkpoint.megatron.dialect import GATE_UP, QKV, Dialect
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, Tensor, generic, layer_of
from llmpipe.layout import Stages, chunk


@dataclass(frozen=True, slots=True)
class Place:
    """A stage of a rank: `stage` of stages.pp * stages.vp, in the order of the flow."""

    tp: int
    stage: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a rank."""

    stored: Stored
    copy_of: tuple[Place, str] | None = None
    """Where the same bytes stand already, and the name there: norms on each rank, a tied head."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How a checkpoint is dealt to ranks."""

    tp: int
    stages: Stages
    padded_vocab: int
    interleaved: bool
    """Whether the rows of q and k are in interleaved rotary order."""
    head_rows: int | None = None
    """Rows of a head that is whole on each rank, where they are others than the padded vocabulary's."""

    def places(self) -> list[Place]:
        """Every rank's stages."""
        return [Place(tp, stage) for stage in range(self.stages.pp * self.stages.vp) for tp in range(self.tp)]

    def layers(self, num_layers: int, stage: int) -> range:
        """The global numbers of a stage's layers."""
        return self.stages.run(num_layers, stage)


def check_split(dialect: Dialect, shape: Shape, grid: Grid) -> None:
    """UserError if the dialect has no such models, or cannot deal this one so."""
    if shape.family not in dialect.families:
        raise UserError(f"{dialect.system} has no {shape.family} models, but {', '.join(dialect.families)}")
    if shape.num_kv_heads % grid.tp or shape.ffn % grid.tp:
        fits = [n for n in range(1, shape.num_kv_heads + 1) if shape.num_kv_heads % n == 0 and shape.ffn % n == 0]
        raise UserError(
            f"tp {grid.tp}: Megatron's ranks share {shape.num_kv_heads} KV heads and the MLP's {shape.ffn} rows evenly:"
            f" tp has to be one of {fits}"
        )
    grid.stages.check(shape.num_layers)


def rank_layout(dialect: Dialect, shape: Shape, grid: Grid, place: Place) -> list[Placed]:
    """The tensors of one stage of a rank, in the flow's order, with the names below `model`.

    Alibaba's way back stops at the first name that is no layer's: the last norm comes after the layers.
    """
    return list(_placed(dialect, shape, grid, place))


def _placed(dialect: Dialect, shape: Shape, grid: Grid, place: Place) -> Iterator[Placed]:
    layers = grid.layers(shape.num_layers, place.stage)
    first, last = place.stage == 0, place.stage == grid.stages.pp * grid.stages.vp - 1
    rows = FAMILIES[shape.family].keys(shape).items()
    for key, row in sorted(rows, key=lambda pair: pair[0].startswith(("norm.", "head."))):
        layer = layer_of(key)
        if layer is None and (first if key.startswith("embedding.") else last):
            yield _outside(dialect, shape, grid, place, key, row)
        elif layer is not None and layer in layers:
            yield from _of_layer(dialect, shape, grid, place, key, row, layer - layers.start)
    if last and not first and shape.tie_embeddings:
        name = _name(dialect, shape, "embedding.weight")
        tied = _vocab_rows(dialect, shape, grid, place, dialect.tied_head or name, "embedding.weight")
        yield Placed(tied, (Place(place.tp, 0), name))


def _outside(dialect: Dialect, shape: Shape, grid: Grid, place: Place, key: str, row: Tensor) -> Placed:
    """The embedding, the last norm, the head."""
    name = _name(dialect, shape, key)
    replica = (Place(0, place.stage), name) if place.tp else None
    if row.dims[0] != "vocab":
        return Placed(piece(name, key, row.slices(shape, 1, 0)), replica)
    if not (dialect.whole_head and key == "head.weight"):
        return Placed(_vocab_rows(dialect, shape, grid, place, name, key))
    rows = grid.head_rows or grid.padded_vocab
    whole = Part(key, slice(0, shape.vocab), slice(0, shape.hidden))
    padding = dialect.padding if rows > shape.vocab else None
    return Placed(Stored(name, (rows, shape.hidden), (whole,), padding=padding), replica)


def _of_layer(
    dialect: Dialect, shape: Shape, grid: Grid, place: Place, key: str, row: Tensor, local: int
) -> Iterator[Placed]:
    """What a layer's tensor is part of: nothing where it stands in one that came before."""
    stem, _, kind = key.rpartition(".")
    what, glu = stem.split(".", 2)[2], FAMILIES[shape.family].mlp == "swiglu"
    if what in ("attention.k", "attention.v") or (what == "mlp.up" and glu):
        return
    if what == "attention.q":
        name = _name(dialect, shape, f"{QKV}.{kind}").format(local)
        yield Placed(_qkv(dialect, shape, grid, place, name, stem, kind))
    elif what == "mlp.gate":
        name = _name(dialect, shape, f"{GATE_UP}.{kind}").format(local)
        yield Placed(_gate_up(dialect, shape, grid, place, name, stem, kind))
    else:
        name = _name(dialect, shape, generic(key)).format(local)
        replica = row.shard_dim is None and place.tp
        stored = piece(name, key, row.slices(shape, grid.tp, place.tp))
        yield Placed(stored, (Place(0, place.stage), name) if replica else None)


def _name(dialect: Dialect, shape: Shape, key: str) -> str:
    name = dialect.stored_name(key, shape.family)
    if name is None:
        raise UserError(f"{dialect.system} has no place for {key} of this {shape.family} model: convert with --to hf")
    return name


def _vocab_rows(dialect: Dialect, shape: Shape, grid: Grid, place: Place, name: str, key: str) -> Stored:
    """A rank's rows of the padded vocabulary; the part of a rank that has padding alone has no rows."""
    each = grid.padded_vocab // grid.tp
    start = min(place.tp * each, shape.vocab)
    rows = slice(start, min((place.tp + 1) * each, shape.vocab))
    padding = dialect.padding if rows.stop - rows.start < each else None
    return Stored(name, (each, shape.hidden), (Part(key, rows, slice(0, shape.hidden)),), padding=padding)


def _qkv(dialect: Dialect, shape: Shape, grid: Grid, place: Place, name: str, stem: str, kind: str) -> Stored:
    """q, k and v of a rank's heads, in one tensor."""
    each, dim = shape.num_heads // shape.num_kv_heads, shape.head_dim
    own = chunk(shape.num_kv_heads, grid.tp, place.tp)
    groups = [range(own.start, own.stop)]
    if dialect.qkv == "grouped":
        groups = [range(head, head + 1) for head in range(own.start, own.stop)]
    parts: list[Part] = []
    at = 0
    for kv_heads in groups:
        q_heads = range(kv_heads.start * each, kv_heads.stop * each)
        for which, heads in (("q", q_heads), ("k", kv_heads), ("v", kv_heads)):
            key = f"{stem.removesuffix('q')}{which}.{kind}"
            parts += _heads(key, heads, shape, at, grid.interleaved and which != "v")
            at += len(heads) * dim
    return Stored(name, (at, shape.hidden) if kind == "weight" else (at,), tuple(parts))


def _heads(key: str, heads: range, shape: Shape, at: int, interleaved: bool) -> list[Part]:
    """Some heads' rows of a matrix, or elements of a bias."""
    if key.endswith(".weight"):
        return list(head_rows(key, heads, shape.head_dim, shape.hidden, at, interleaved))
    if interleaved:
        raise UserError("biases of q and k in interleaved rotary order are in no Megatron that llmpipe knows")
    return [Part(key, slice(0, 1), slice(heads.start * shape.head_dim, heads.stop * shape.head_dim), at_col=at)]


def _gate_up(dialect: Dialect, shape: Shape, grid: Grid, place: Place, name: str, stem: str, kind: str) -> Stored:
    """A rank's rows of gate and of up, one above the other."""
    own = chunk(shape.ffn, grid.tp, place.tp)
    each = own.stop - own.start
    keys = [f"{stem}.{kind}", f"{stem.removesuffix('gate')}up.{kind}"]
    pairs = list(enumerate(keys if dialect.gate_first else keys[::-1]))
    if kind == "weight":
        parts = [Part(key, own, slice(0, shape.hidden), number * each) for number, key in pairs]
        return Stored(name, (2 * each, shape.hidden), tuple(parts))
    parts = [Part(key, slice(0, 1), own, at_col=number * each) for number, key in pairs]
    return Stored(name, (2 * each,), tuple(parts))

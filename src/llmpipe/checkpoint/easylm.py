"""EasyLM's format (github.com/young-geng/EasyLM): one file of flax's msgpack, streaming or nested, and metadata.pkl.

- `streaming_params`: transformer/wte/embedding (V, C), transformer/h/N/…, transformer/ln_f/kernel, lm_head/kernel
- `streaming_train_state`: the same below params/params, beside step and opt_state, which are left alone
- `…_STEP` for milestones; a converted or a nested file has any name
- kernels are (in, out); each head's columns of wq and wk are in interleaved rotary order; the head is never tied
- head_dim is hidden / heads; no biases, windows or rope scaling
- the files say nothing of the shape: metadata.pkl does (llama_config), where EasyLM's trainer wrote one

EasyLM's own forward takes 10000 for theta, whatever rope_theta says (docs/proof/easylm.json). The setting is what its
users ask for and what its own export writes, so it is what we carry.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from llmpipe.checkpoint import tokenizer_files
from llmpipe.checkpoint.blocks import FileSource
from llmpipe.checkpoint.containers.msgpack_file import MsgpackFile, StoredArray, read_msgpack
from llmpipe.checkpoint.containers.msgpack_write import record_heads
from llmpipe.checkpoint.easylm_files import (
    METADATA,
    STATE,
    WEIGHTS,
    metadata_bytes,
    metadata_of,
    read_shape,
    split_prefix,
    weights_file,
)  # fmt: skip
from llmpipe.checkpoint.layouts import Stored, blocks_of, head_rows, whole
from llmpipe.checkpoint.mover import Filled, Mover, Segments, write_files
from llmpipe.checkpoint.pieces import cut_out, in_pieces
from llmpipe.checkpoint.source import TensorSource, check_expected, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape
from llmpipe.files import sha256
from llmpipe.progress import progress

log = logging.getLogger(__name__)

HEAD = "lm_head/kernel"
# EasyLM's name, ours, and whether it is stored as (in, out); in the order of EasyLM's own converter.
_FIRST = (("transformer/wte/embedding", "embedding.weight", False), ("transformer/ln_f/kernel", "norm.weight", False))
_LAYER = (
    ("attention/wq/kernel", "attention.q.weight", True),
    ("attention/wk/kernel", "attention.k.weight", True),
    ("attention/wv/kernel", "attention.v.weight", True),
    ("attention/wo/kernel", "attention.o.weight", True),
    ("feed_forward/w1/kernel", "mlp.gate.weight", True),
    ("feed_forward/w2/kernel", "mlp.down.weight", True),
    ("feed_forward/w3/kernel", "mlp.up.weight", True),
    ("attention_norm/kernel", "attention_norm.weight", False),
    ("ffn_norm/kernel", "mlp_norm.weight", False),
)
_LEFT_ALONE = ("step", "opt_state")
_TIED_ROWS = 4096


def layout(shape: Shape) -> list[Stored]:
    """Every tensor of a model as EasyLM stores it, by its name in a params file; UserError if EasyLM cannot hold it."""
    check_fits(shape)
    names = [*_FIRST]
    for layer in range(shape.num_layers):
        names += [(f"transformer/h/{layer}/{name}", f"layers.{layer}.{key}", kernel) for name, key, kernel in _LAYER]
    names += [(HEAD, "embedding.weight" if shape.tie_embeddings else "head.weight", True)]
    return [_stored(name, key, kernel, shape) for name, key, kernel in names]


def _stored(name: str, key: str, kernel: bool, shape: Shape) -> Stored:
    plain = whole(name, key, FAMILIES[shape.family].row(key, shape), shape)
    if not kernel:
        return plain
    rotary = {"wq": shape.num_heads, "wk": shape.num_kv_heads}.get(name.split("/")[-2])
    parts = plain.parts
    if rotary:
        parts = tuple(head_rows(key, range(rotary), shape.head_dim, shape.hidden, 0, interleaved=True))
    return Stored(name, plain.shape[::-1], parts, transposed=True)  # (in, out)


def check_fits(shape: Shape) -> None:
    """UserError, with each reason, for a model that EasyLM's Llama does not compute."""
    family = FAMILIES[shape.family]
    reasons = {
        "its layers are not Llama's": family.parallel or (family.norm, family.mlp) != ("rms", "swiglu"),
        "it has biases": shape.qkv_bias or shape.output_bias or shape.mlp_bias,
        "it has norms of q and k": shape.qk_norm,
        "it has a sliding window": shape.window is not None,
        "its rotary embedding is scaled": shape.rope_scaling is not None,
        f"its head_dim {shape.head_dim} is not hidden / heads": shape.head_dim * shape.num_heads != shape.hidden,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"EasyLM's format cannot hold this {shape.family} model: {', '.join(found)}: choose another")


class EasyLMSource(FileSource):
    """A file of EasyLM's, or a directory with one; `path` is the directory, `file` the file.

    `expected` gives the shape where no metadata.pkl does.
    """

    def __init__(self, path: Path, expected: Shape | None = None):
        kind, path = split_prefix(path)
        file = weights_file(path)
        if file is None:
            raise UserError(f"{path} holds no weights of EasyLM's: expected {WEIGHTS}, {STATE} or a flax msgpack file")
        stored = read_msgpack(file)
        _check_kind(kind, stored)
        found = read_shape(file)
        if expected and found:
            unsaid = {"family": expected.family, "tie_embeddings": expected.tie_embeddings}
            check_expected(replace(found, **unsaid), expected, path)
        shape = expected or found
        if shape is None:
            raise UserError(
                f"{path} does not say its model's shape, and neither {metadata_of(file).name} nor config.json lies"
                " beside it: name it with --shape, or put Hugging Face's config.json of the model there"
            )
        self.file = file
        super().__init__(file.parent, shape, FAMILIES[shape.family].keys(shape))
        _fill(self, file, _weights(stored))


def _fill(source: FileSource, file: Path, arrays: dict[str, StoredArray]) -> None:
    """Check the arrays against the model's shape, and say where each of our tensors lies."""
    tensors, tied = layout(source.shape), source.shape.tie_embeddings
    if tied and HEAD not in arrays:  # flax files of other makers
        tensors = [stored for stored in tensors if stored.name != HEAD]
    check_tensors(file, {s.name: s.shape for s in tensors}, {name: a.shape for name, a in arrays.items()})
    for stored in tensors:
        if tied and stored.name == HEAD:
            continue
        for cut, tensor in in_pieces(stored, arrays[stored.name]):
            for key, block in blocks_of(cut, tensor):
                source.add(key, block, tensor.dtype)
    source.check_covered()
    if tied and HEAD in arrays:
        _check_tied(source, file, arrays)


def _check_tied(source: FileSource, file: Path, arrays: dict[str, StoredArray]) -> None:
    """EasyLM stores the head of a tied model, too: it has to be the embedding, or training has untied them."""
    shape = replace(source.shape, tie_embeddings=False)
    untied = FileSource(source.path, shape, FAMILIES[shape.family].keys(shape))
    _fill(untied, file, arrays)
    for first in range(0, shape.vocab, _TIED_ROWS):
        rows = (slice(first, first + _TIED_ROWS), slice(None))
        if not torch.equal(untied.read("head.weight", rows), untied.read("embedding.weight", rows)):
            raise UserError(
                f"{file}: {HEAD} is not the embedding, though the model's shape is tied: name an untied shape"
            )


def _check_kind(kind: str | None, stored: MsgpackFile) -> None:
    """EasyLM's prefix has to say what the file is."""
    state = any(name.startswith("params/params/") for name in stored.arrays)
    fits = {
        None: True,
        "params": stored.streaming and not state,
        "flax_params": not stored.streaming,
        "trainstate": stored.streaming and state,
        "trainstate_params": stored.streaming and state,
    }
    if not fits[kind]:
        found = ("flax_params", "flax_params") if not stored.streaming else ("params", "trainstate")
        raise UserError(f"{stored.path} is named with {kind}::, but is of {found[state]}::")


def _weights(stored: MsgpackFile) -> dict[str, StoredArray]:
    """The model's arrays by their names in a params file, wherever the file keeps them."""
    left = [name for name in stored.arrays if name.split("/")[0] in _LEFT_ALONE]
    if left:
        log.info("%s: left alone, not weights: %d tensors of step and opt_state", stored.path, len(left))
    return {
        name.removeprefix("params/").removeprefix("params/"): array
        for name, array in stored.arrays.items()
        if name not in left
    }


def write(mover: Mover, directory: Path, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Fill a directory with a source as EasyLM's streaming params, metadata.pkl and the tokenizer's files.

    `dtype` None keeps each tensor's stored type. Returns the files' SHA-256. UserError for what EasyLM cannot hold.
    """
    segments = streaming_file(mover.source, dtype)
    hashes: dict[str, str | None] = {**tokenizer_files.carry(mover.source, directory)}
    (directory / METADATA).write_bytes(metadata_bytes(mover.source.shape))
    hashes[METADATA] = sha256(directory / METADATA)
    total = sum(len(part) if isinstance(part, bytes) else part.bytes for part in segments)
    with progress("convert", total, "B") as shown:
        return hashes | write_files(mover, {directory / WEIGHTS: segments}, shown)


def targets(source: TensorSource, dtype: torch.dtype | None = None) -> dict[str, list[Filled]]:
    """The weight file and its tensors; those of more than 1 GiB in pieces."""
    return {WEIGHTS: [part for part in streaming_file(source, dtype) if isinstance(part, Filled)]}


def streaming_file(source: TensorSource, dtype: torch.dtype | None = None) -> Segments:
    """A streaming file of params from its beginning to its end."""
    segments: Segments = []
    for stored in layout(source.shape):
        kind = dtype or source.dtype(stored.parts[0].key)
        for head, rows in record_heads(stored.name, stored.shape, kind):
            segments += [head, Filled(cut_out(stored, rows, slice(0, stored.shape[-1])), kind)]
    return segments

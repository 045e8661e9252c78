"""Meta's own format: params.json and consolidated.NN.pth, one file for each model-parallel rank of its training.

- params.json: dim, n_layers, n_heads, n_kv_heads (absent: n_heads), norm_eps, vocab_size (-1: see the tokenizer),
  rope_theta (absent: 10000), multiple_of and ffn_dim_multiplier (the MLP's size is read from w1)
- wq, wk, wv, w1, w3, output are split by rows; wo, w2 by columns; the embedding by columns (Llama 3: by rows);
  norms are whole in each
- each head's rows of wq and wk stand in interleaved rotary order: rows 0, d/2, 1, d/2 + 1, ... of the half-split order
- rope.freqs is a buffer, derived from the parameters
"""

import logging
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from llmpipe.checkpoint.source import Slices, check_expected, check_tensors, overlap, resolved, sizes_of
from llmpipe.checkpoint.stream import GET_AGAIN
from llmpipe.errors import UserError, nearest
from llmpipe.families import FAMILIES, Shape, generic, layer_of
from llmpipe.files import read_json

log = logging.getLogger(__name__)

# Our name: Meta's name, and the dimension that its ranks split. None: whole in each.
_NAMES = {
    "embedding.weight": ("tok_embeddings.weight", 1),
    "layers.{}.attention_norm.weight": ("layers.{}.attention_norm.weight", None),
    "layers.{}.attention.q.weight": ("layers.{}.attention.wq.weight", 0),
    "layers.{}.attention.k.weight": ("layers.{}.attention.wk.weight", 0),
    "layers.{}.attention.v.weight": ("layers.{}.attention.wv.weight", 0),
    "layers.{}.attention.o.weight": ("layers.{}.attention.wo.weight", 1),
    "layers.{}.mlp_norm.weight": ("layers.{}.ffn_norm.weight", None),
    "layers.{}.mlp.gate.weight": ("layers.{}.feed_forward.w1.weight", 0),
    "layers.{}.mlp.up.weight": ("layers.{}.feed_forward.w3.weight", 0),
    "layers.{}.mlp.down.weight": ("layers.{}.feed_forward.w2.weight", 1),
    "norm.weight": ("norm.weight", None),
    "head.weight": ("output.weight", 0),
}  # fmt: skip
_INTERLEAVED = ("attention.q.weight", "attention.k.weight")
_DERIVED = ("rope.freqs",)
_PARAMS = {
    "dim", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "multiple_of", "n_heads", "n_kv_heads", "n_layers",
    "norm_eps", "rope_theta", "use_scaled_rope", "vocab_size",
}  # fmt: skip
# params.json does not say it and no arithmetic depends on it: Llama 2's, unless the shape is named.
MAX_POSITIONS = 4096


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors of a .pth; nothing in it is run (design decision 6)."""
    if not zipfile.is_zipfile(path):  # the zip's table of contents is at its end
        raise UserError(
            f"{path} is truncated or not a .pth of torch 1.6 or later ({path.stat().st_size} bytes):"
            " copy or download it again"
        )
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"asks for {asked[1]}" if asked else "is not made of tensors alone"
        raise UserError(
            f"{path} is refused: it {reason} and could run code when loaded: use Meta's own file"
        ) from error
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): copy or download it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no table of tensors: use Meta's own file")
    return state


def shard_files(path: Path) -> list[Path]:
    """consolidated.00.pth and on; UserError if one of the numbers is missing."""
    files = sorted(path.glob("consolidated.*.pth"))
    wanted = [path / f"consolidated.{number:02d}.pth" for number in range(len(files))]
    if not files or files != wanted:
        missing = sorted({file.name for file in wanted} - {file.name for file in files}) or ["consolidated.00.pth"]
        raise UserError(
            f"{path}: {', '.join(missing)} is missing beside {', '.join(f.name for f in files) or 'params.json'}:"
            " copy or download all shards"
        )
    return files


def read_params(path: Path) -> dict[str, Any]:
    """params.json; UserError for a key that would be lost, or one that the decoder does not compute."""
    params = read_json(path, GET_AGAIN)
    if not isinstance(params, dict):
        raise UserError(f"{path} is no table of keys: copy or download it again")
    for key in params:
        if key not in _PARAMS:
            raise UserError(f"{path}: the key {key} is unknown and would be lost: {nearest(key, _PARAMS)}")
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        if key not in params:
            raise UserError(f"{path}: the key {key} is missing: copy or download it again")
    if params.get("use_scaled_rope"):
        raise UserError(
            f"{path}: use_scaled_rope is true (Llama 3.1): this version of llmpipe computes without rope scaling only"
        )
    return params


class MetaSource:
    """A directory of Meta's; `expected` is checked, and says the longest sequence, which Meta's files do not."""

    def __init__(self, path: Path, expected: Shape | None = None):
        self.path = path
        files = shard_files(path)
        params = read_params(path / "params.json")
        self._shards = [load_pickle(file) for file in files]
        self._same_names()
        # Llama 1 and 2 split the embedding by columns, Llama 3 by rows.
        embedding = self._shards[0].get("tok_embeddings.weight", torch.empty(0, 0))
        self._embedding_dim = 0 if embedding.shape[1] == params["dim"] else 1
        try:
            self.shape = self._read_shape(params, expected)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, UserError) and str(path) in str(error):
                raise
            raise UserError(f"{path / 'params.json'}: {error}: copy or download it again") from error
        self._table = FAMILIES[self.shape.family].keys(self.shape)
        self._check_tensors()
        if expected:
            check_expected(self.shape, expected, path)

    def _same_names(self) -> None:
        for number, shard in enumerate(self._shards[1:], 1):
            unlike = sorted(set(shard) ^ set(self._shards[0]))
            if unlike:
                raise UserError(
                    f"{self.path}: consolidated.00.pth and consolidated.{number:02d}.pth do not hold the same tensors:"
                    f" {', '.join(unlike[:8])}: copy or download both again"
                )

    def _read_shape(self, params: dict[str, Any], expected: Shape | None) -> Shape:
        """Every hyper-parameter; the vocabulary and the MLP's size are the tensors' own."""
        if expected is None and not params.get("max_seq_len"):
            log.info(
                "%s: params.json does not say the longest sequence: %d, Llama 2's, taken", self.path, MAX_POSITIONS
            )
        vocab = self._merged_shape("tok_embeddings.weight", self._embedding_dim)[0]
        if params.get("vocab_size", -1) not in (-1, vocab):
            raise UserError(
                f"{self.path}: params.json says vocab_size {params['vocab_size']}, but tok_embeddings has {vocab} rows"
            )
        return Shape(
            family="llama",
            num_layers=params["n_layers"],
            hidden=params["dim"],
            num_heads=params["n_heads"],
            num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
            head_dim=params["dim"] // params["n_heads"],
            ffn=self._merged_shape("layers.0.feed_forward.w1.weight", 0)[0],
            vocab=vocab,
            max_positions=params.get("max_seq_len") or (expected.max_positions if expected else MAX_POSITIONS),
            norm_eps=float(params["norm_eps"]),
            rope_theta=float(params.get("rope_theta", 1e4)),
        )

    def _merged_shape(self, name: str, dim: int | None) -> tuple[int, ...]:
        """The full tensor's sizes, from its pieces' along the dimension that is split."""
        if name not in self._shards[0]:
            raise UserError(f"{self.path}: the tensor {name} is missing: copy or download the weights again")
        shapes = [tuple(shard[name].shape) for shard in self._shards]
        if len({shape[:dim] + shape[dim + 1 :] if dim is not None else shape for shape in shapes}) != 1:
            raise UserError(f"{self.path}: the shards' pieces of {name} do not fit each other: {shapes}")
        if dim is None:
            return shapes[0]
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])

    def _check_tensors(self) -> None:
        """Every tensor is there once in its shape, and what the shards all hold is the same in each."""
        dims = {self._locate(key)[0]: self._locate(key)[1] for key in self._table}
        derived = [name for name in self._shards[0] if name in _DERIVED]
        if derived:
            log.info("%s: ignored, derived from params.json: %s", self.path, ", ".join(derived))
        found = {
            name: self._merged_shape(name, dims[name]) if name in dims else tuple(tensor.shape)
            for name, tensor in self._shards[0].items()
            if name not in derived
        }
        check_tensors(self.path, {self._locate(key)[0]: t.shape(self.shape) for key, t in self._table.items()}, found)
        for name in (name for name, dim in dims.items() if dim is None):
            if any(not torch.equal(shard[name], self._shards[0][name]) for shard in self._shards[1:]):
                raise UserError(f"{self.path}: {name} is not the same in all shards: they are not of one model")

    def _locate(self, key: str) -> tuple[str, int | None]:
        """Meta's name for one of ours, and the dimension that the shards split."""
        name, dim = _NAMES[generic(key)]
        return name.format(layer_of(key)), self._embedding_dim if key == "embedding.weight" else dim

    def keys(self) -> list[str]:
        return list(self._table)

    def dtype(self, key: str) -> torch.dtype:
        return self._shards[0][self._locate(key)[0]].dtype

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        name, dim = self._locate(key)
        sizes = self._table[key].shape(self.shape)
        pieces = [shard[name] for shard in (self._shards if dim is not None else self._shards[:1])]
        if key.endswith(_INTERLEAVED):
            whole = half_split(pieces, self.shape.head_dim)
            return whole if slices is None else whole[slices].clone()
        wanted = resolved(slices, sizes)
        part = torch.empty(sizes_of(wanted), dtype=pieces[0].dtype)
        start = 0
        for piece in pieces:
            region = [slice(0, size) for size in sizes]
            if dim is not None:
                region[dim] = slice(start, start + piece.shape[dim])
                start += piece.shape[dim]
            if common := overlap(tuple(region), wanted):
                part[common[1]] = piece[common[0]]
        return part


def half_split(pieces: list[torch.Tensor], head_dim: int) -> torch.Tensor:
    """The pieces' rows one after the other, each head's brought from interleaved rotary order to half-split order."""
    if any(piece.shape[0] % head_dim for piece in pieces):  # more shards than KV heads: a head lies in two
        pieces = [torch.cat(pieces)]
    hidden = pieces[0].shape[1]
    whole = torch.empty(sum(piece.shape[0] for piece in pieces), hidden, dtype=pieces[0].dtype)
    heads = whole.view(-1, 2, head_dim // 2, hidden)  # (head, half, pair, hidden)
    start = 0
    for piece in pieces:
        interleaved = piece.reshape(-1, head_dim // 2, 2, hidden)  # (head, pair, half, hidden)
        heads[start : start + len(interleaved)] = interleaved.transpose(1, 2)
        start += len(interleaved)
    return whole

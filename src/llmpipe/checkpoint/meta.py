"""Meta's own format, read: params.json and consolidated.NN.pth, one file for each model-parallel rank of its training.

Mistral's own is the same in one file, consolidated.00.pth or consolidated.safetensors: the same names, the same rotary
order (github.com/mistralai/mistral-inference).

- params.json: see `params_json`
- which tensor's rows or columns lie in which file: `meta_write.layout`, which writing shares
- rope.freqs is a buffer, derived from the parameters
"""

import logging
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmpipe.checkpoint import meta_write
from llmpipe.checkpoint.blocks import FileSource, same_bytes
from llmpipe.checkpoint.carried import check_pulled
from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.containers.stored import StoredTensor
from llmpipe.checkpoint.containers.torch_file import archive_name, read_torch_file
from llmpipe.checkpoint.layouts import blocks_of
from llmpipe.checkpoint.params_json import read_fields, read_params
from llmpipe.checkpoint.source import check_expected, check_tensors
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape

log = logging.getLogger(__name__)

# Llama 2's, Llama 1's, and that of MinfanZhao's converter.
_DERIVED = re.compile(r"rope\.freqs|layers\.\d+\.attention\.inner_attention\.rope\.freqs")
SAFETENSORS = "consolidated.safetensors"


def shard_files(path: Path) -> list[Path]:
    """consolidated.00.pth and on, or consolidated.safetensors; UserError if one of the numbers is missing."""
    files, single = sorted(path.glob("consolidated.*.pth")), path / SAFETENSORS
    if single.exists() and files:
        raise UserError(f"{path} holds the model twice, as {files[0].name} and as {single.name}: take one away")
    if single.exists():
        return [single]
    wanted = [path / meta_write.file_name(number) for number in range(len(files))]
    if not files or files != wanted or not all(file.is_file() for file in files):
        missing = [file.name for file in wanted if not file.is_file()] or ["consolidated.00.pth"]
        raise UserError(
            f"{path}: {', '.join(missing)} is missing beside {', '.join(f.name for f in files) or 'params.json'}:"
            " copy or download all shards"
        )
    return files


class MetaSource(FileSource):
    """A directory of Meta's; `expected` is checked, and says what the files do not: longest sequence and tying."""

    def __init__(self, path: Path, expected: Shape | None = None):
        self.path = path
        params = read_params(path / "params.json")
        self._shards = {meta_write.file_name(rank): _read(file) for rank, file in enumerate(shard_files(path))}
        self._first = next(iter(self._shards.values()))
        self._same_names()
        # Llama 1 and 2 split the embedding by columns, Llama 3 by rows.
        embedding = self._first.get("tok_embeddings.weight")
        by_rows = embedding is not None and embedding.shape[1:] == (params["dim"],)
        try:
            shape = self._read_shape(params, expected, by_rows)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, UserError) and str(path) in str(error):
                raise
            raise UserError(f"{path / 'params.json'}: {error}: copy or download it again") from error
        super().__init__(path, shape, FAMILIES[shape.family].keys(shape))
        self._check_tensors(by_rows)
        self._add_blocks(by_rows)
        self.check_different()
        if expected:
            check_expected(self.shape, expected, path)

    def _same_names(self) -> None:
        names = list(self._shards)
        for name in names[1:]:
            unlike = sorted(set(self._shards[name]) ^ set(self._first))
            if unlike:
                raise UserError(
                    f"{self.path}: {names[0]} and {name} do not hold the same tensors: {', '.join(unlike[:8])}: copy or"
                    " download both again"
                )

    def _read_shape(self, params: dict[str, Any], expected: Shape | None, by_rows: bool) -> Shape:
        """Every hyper-parameter; the vocabulary and the MLP's size are the tensors' own."""
        vocab = self._merged("tok_embeddings.weight", 0 if by_rows else 1)[0]
        if params.get("vocab_size", -1) not in (-1, vocab):
            raise UserError(
                f"{self.path}: params.json says vocab_size {params['vocab_size']}, but tok_embeddings has {vocab} rows"
            )
        ffn = self._merged("layers.0.feed_forward.w1.weight", 0)[0]
        if params.get("hidden_dim", ffn) != ffn:
            raise UserError(f"{self.path}: params.json says hidden_dim {params['hidden_dim']}, but w1 has {ffn} rows")
        return Shape(vocab=vocab, ffn=ffn, **read_fields(params, expected, self.path / "params.json"))

    def _merged(self, name: str, dim: int | None) -> tuple[int, ...]:
        """The full tensor's sizes, from its pieces' along the dimension that is split."""
        if name not in self._first:
            raise UserError(f"{self.path}: the tensor {name} is missing: copy or download the weights again")
        shapes = [shard[name].shape for shard in self._shards.values()]
        if len({shape[:dim] + shape[dim + 1 :] if dim is not None else shape for shape in shapes}) != 1:
            raise UserError(f"{self.path}: the shards' pieces of {name} do not fit each other: {shapes}")
        if dim is None:
            return shapes[0]
        return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])

    def _check_tensors(self, by_rows: bool) -> None:
        """Every tensor is there once in its shape, and what the shards all hold is the same in each."""
        dims, expected = meta_write.split_dims(self.shape, by_rows), meta_write.layout(self.shape, 1, by_rows)
        derived = [name for name in self._first if _DERIVED.fullmatch(name)]
        if derived:
            log.info("%s: ignored, derived from params.json: %s", self.path, ", ".join(derived))
        found = {name: self._merged(name, dims.get(name)) for name in self._first if name not in derived}
        whole = {stored.name: stored.shape for stored in next(iter(expected.values()))}
        check_tensors(self.path, whole, found)
        for name in (name for name, dim in dims.items() if dim is None):
            if not all(same_bytes(shard[name], self._first[name]) for shard in self._shards.values()):
                raise UserError(f"{self.path}: {name} is not the same in all shards: they are not of one model")

    def _add_blocks(self, by_rows: bool) -> None:
        """Where each of our tensors lies in the shards."""
        dims, head = meta_write.split_dims(self.shape, by_rows), meta_write.meta_name("head.weight")
        for name, layout in meta_write.layout(self.shape, len(self._shards), by_rows, self._vocab()).items():
            shard = self._shards[name]
            for stored in layout:
                if shard[stored.name].shape != stored.shape:
                    raise UserError(
                        f"{self.path}: {stored.name} in {name} is {list(shard[stored.name].shape)}, expected"
                        f" {list(stored.shape)}: the shards do not share it evenly"
                    )
                if stored.name == head and self.shape.tie_embeddings:
                    self._check_tied(shard, by_rows)
                elif dims[stored.name] is not None or shard is self._first:  # the others hold copies
                    for key, block in blocks_of(stored, shard[stored.name]):
                        self.add(key, block, shard[stored.name].dtype)

    def _vocab(self) -> list[slice]:
        """Each shard's rows of the head."""
        ends = list(accumulate(shard[meta_write.meta_name("head.weight")].shape[0] for shard in self._shards.values()))
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _check_tied(self, shard: dict[str, StoredTensor], by_rows: bool) -> None:
        """The head is the embedding; several shards that split the two differently are not compared."""
        if (len(self._shards) > 1 and not by_rows) or same_bytes(
            shard["output.weight"], shard["tok_embeddings.weight"]
        ):
            return
        raise UserError(
            f"{self.path}: the shape says that head and embedding are one tensor, but output.weight is not"
            " tok_embeddings.weight: name the shape that belongs to these weights"
        )


def _read(path: Path) -> dict[str, StoredTensor]:
    """A file's tensors by Meta's names; nothing in it is run (design decision 6)."""
    check_pulled(path)
    if path.name == SAFETENSORS:
        return safetensors_file.read_header(path)[0]
    saved = archive_name(path)
    if re.fullmatch(r"consolidated\.\d\d", saved) and saved != path.stem:
        raise UserError(f"{path} was saved as {saved}.pth: files are swapped or doubled: copy or download all again")
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(value, StoredTensor) for value in state.values()):
        raise UserError(f"{path} holds no table of tensors: use Meta's own file")
    if other := [name for name in state if not isinstance(name, str)]:
        raise UserError(f"{path} names a tensor {other[0]!r}: use Meta's own file")
    return state

"""Datasets on disk: PREFIX.bin and PREFIX.idx, Megatron's mmap format, byte for byte.

- All numbers are little-endian.
- PREFIX.bin is the tokens of all sequences, one after the other, without a header.
- PREFIX.idx starts with 9 bytes `MMIDIDX\\0\\0`, a uint64 version (1) and a uint8 type code of the tokens:
  1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16.
- Then a uint64 with the number of sequences, and one with the length of the document index (documents + 1).
- Then int32 per sequence, its size in tokens; int64 per sequence, the byte of the .bin at which it starts;
  int64 per entry of the document index, the sequence at which a document starts; first 0, last the number of sequences.
- Nothing follows. Megatron's multimodal files add a byte per sequence: they are refused.
- What else is read: `llmpipe.data.dataset.index_file`.
- llmpipe writes one sequence per document, and uint16 where the vocabulary has fewer than 65,500 tokens, else int32.
- Beside them stands PREFIX.manifest.json, see `llmpipe.data.dataset.manifest`; Megatron's own datasets have none.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.dataset.index_file import CODES, HEADER, MAGIC, VERSION, read_index
from llmpipe.data.dataset.manifest import bin_path, idx_path, manifest_path
from llmpipe.errors import UserError
from llmpipe.files import CHUNK_BYTES, aside, fsync_directory, remove_left

UINT16_BELOW = 65_500


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How the tokens of a vocabulary of this size are stored."""
    return np.dtype(np.uint16 if vocab_size < UINT16_BELOW else np.int32)


class Writer:
    """Streams sequences into PREFIX.bin and PREFIX.idx, which take their names together when the block ends well.

    Memory does not grow with the dataset.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]):
        if not prefix.name:
            raise UserError(f"--output {prefix} has no name of its own: name a prefix, as in {prefix / 'corpus'}")
        self.prefix = prefix
        self.dtype = np.dtype(dtype if np.dtype(dtype) in CODES else np.int32)  # floating-point numbers are read only
        self.num_sequences = self.num_documents = self.num_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._paths = [bin_path(prefix), idx_path(prefix)]
        for path in self._paths:
            remove_left(path)
        self._bin, self._idx = (aside(path).open("w+b") for path in self._paths)
        self._idx.write(bytes(HEADER.size))  # the counts are known at the end
        self._documents = tempfile.TemporaryFile(dir=prefix.parent)  # noqa: SIM115
        self._documents.write(np.int64(0).tobytes())

    def __enter__(self) -> "Writer":
        return self

    def add(self, tokens: NDArray[Any], sizes: NDArray[Any], document_ends: NDArray[Any] | None = None) -> None:
        """Add whole documents: their tokens laid end to end, and the size of each of their sequences.

        `document_ends` counts sequences from the first of these; left out, every sequence is a document.
        """
        assert tokens.size == sizes.sum(), (tokens.size, sizes.sum())
        if sizes.size and sizes.max() > np.iinfo(np.int32).max:
            number = self.num_documents + int(sizes.argmax())
            raise UserError(
                f"document {number} has {sizes.max():,} tokens, but the format takes 2,147,483,647: cut it up"
            )
        if document_ends is None:
            document_ends = np.arange(1, len(sizes) + 1)
        self._bin.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._idx.write(sizes.astype("<i4").data)
        self._documents.write((document_ends + self.num_sequences).astype("<i8").data)
        self.num_sequences += len(sizes)
        self.num_documents += len(document_ends)
        self.num_tokens += tokens.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish_index()
                self._publish()
        finally:
            for path in self._paths:  # before closing, which writes what is buffered and fails on a full disk
                aside(path).unlink(missing_ok=True)
            for file in (self._bin, self._idx, self._documents):
                with suppress(OSError):
                    file.close()

    def _finish_index(self) -> None:
        """Append the pointers, chunk by chunk from the sizes, and the document index; fill in the header."""
        start = 0
        for first in range(0, self.num_sequences, CHUNK_BYTES):
            count = min(CHUNK_BYTES, self.num_sequences - first)
            self._idx.seek(HEADER.size + 4 * first)
            sizes = np.frombuffer(self._idx.read(4 * count), "<i4")
            self._idx.seek(HEADER.size + 4 * self.num_sequences + 8 * first)
            self._idx.write(helpers.byte_pointers(sizes, self.dtype.itemsize, start).data)
            start += int(sizes.sum(dtype=np.int64)) * self.dtype.itemsize
        self._idx.seek(0, os.SEEK_END)
        self._documents.seek(0)
        shutil.copyfileobj(self._documents, self._idx, CHUNK_BYTES)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.num_sequences, self.num_documents + 1))

    def _publish(self) -> None:
        """Both files under their names; between the renames there is no .idx, so nothing looks finished."""
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
        manifest_path(self.prefix).unlink(missing_ok=True)
        self._paths[1].unlink(missing_ok=True)
        for path in self._paths:
            aside(path).replace(path)
        fsync_directory(self.prefix.parent)


class Reader:
    """A dataset mapped into memory; UserError, naming what is wrong, if its two files do not fit together."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise UserError(f"{path} is missing: {prefix} is not a finished dataset; llmpipe tokenize makes one")
        bin_bytes = bin_path(prefix).stat().st_size
        index = read_index(idx_path(prefix), bin_bytes)
        self.dtype, self.sizes, self.documents = index.dtype, index.sizes, index.documents
        try:
            helpers.check_index(self.sizes, index.pointers, self.documents, self.dtype.itemsize, bin_bytes)
        except ValueError as error:
            where = f"{idx_path(prefix)} does not fit {bin_path(prefix)}"
            raise UserError(f"{where}: {error}; tokenize the corpus again") from error
        # an empty file cannot be mapped
        self.tokens = np.memmap(bin_path(prefix), self.dtype, "r") if bin_bytes else np.empty(0, self.dtype)
        if self.dtype.kind == "f":
            _check_whole(self.tokens, bin_path(prefix))
        # (D + 1,) the token of the .bin at which each document starts, and the end
        self.starts = np.append(index.pointers // self.dtype.itemsize, len(self.tokens))[self.documents]

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document."""
        return np.diff(self.starts)

    def read(self, document: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """A view of a document's tokens from `offset` on, `length` of them or all."""
        start, end = self.starts[document], self.starts[document + 1]
        stop = end if length is None else min(end, start + offset + length)
        return self.tokens[start + offset : stop]


def _check_whole(tokens: NDArray[Any], path: Path) -> None:
    """UserError for tokens that are stored as floating-point numbers and are no token ids."""
    for first in range(0, len(tokens), CHUNK_BYTES):
        part = tokens[first : first + CHUNK_BYTES]
        with np.errstate(invalid="ignore"):  # nan
            wrong = ~((part >= 0) & (part < 2**31) & (part == np.trunc(part)))
        if wrong.any():
            number = int(wrong.argmax())
            raise UserError(f"{path} holds {part[number]} as token {first + number}, which is no token id")

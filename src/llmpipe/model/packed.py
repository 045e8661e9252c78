"""Where documents are among the tokens of a micro-batch, and which of them a context rank's queries see.

N tokens of all rows and documents end to end, of which each of cp context ranks holds N/cp.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from llmpipe.layout import context_slices
from llmpipe.parallel.groups import ONE_CONTEXT, ContextParallel


@dataclass(frozen=True, eq=False)
class Packed:
    """Where documents begin and end among N tokens: `cu_seqlens` (documents + 1,) int32, from 0 to N.

    It may be padded at its end with N, so that the micro-batches of a step have one length.
    """

    cu_seqlens: torch.Tensor
    cp: ContextParallel = ONE_CONTEXT

    @cached_property
    def bounds(self) -> list[int]:
        """The boundaries as Python numbers, without padding."""
        return sorted(set(self.cu_seqlens.tolist()))

    @cached_property
    def own(self) -> list[slice]:
        """This rank's tokens."""
        return context_slices(self.bounds[-1], self.cp.size, self.cp.rank)

    @cached_property
    def own_by_document(self) -> list[list[tuple[int, int, int]]]:
        """Of each own slice, for each document in it: its start, and where this rank's tokens of it start and stop."""
        return [
            [
                (start, max(start, own.start), min(stop, own.stop))
                for start, stop in pairwise(self.bounds)
                if start < own.stop and stop > own.start
            ]
            for own in self.own
        ]

    @cached_property
    def pieces(self) -> list[tuple[int, int]]:
        """This rank's queries document by document: how many, and how many keys they see, which end where they do."""
        documents = (document for own in self.own_by_document for document in own)
        return [(stop - first, stop - start) for start, first, stop in documents]

    @cached_property
    def seen(self) -> list[slice]:
        """The tokens whose keys the pieces see, end to end: of each own slice from its first document's start on."""
        return [slice(documents[0][0], documents[-1][2]) for documents in self.own_by_document]

    @cached_property
    def cu_queries(self) -> torch.Tensor:
        """(pieces + 1,) int32: where the pieces' queries begin, as variable-length kernels want it; may be padded."""
        return self.cu_seqlens if self.cp.size == 1 else self._ends([queries for queries, _ in self.pieces])

    @cached_property
    def cu_keys(self) -> torch.Tensor:
        """(pieces + 1,) int32: where the pieces' keys begin."""
        return self.cu_seqlens if self.cp.size == 1 else self._ends([keys for _, keys in self.pieces])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """The most queries of a piece, and the most keys."""
        queries, keys = zip(*self.pieces, strict=True)
        return max(queries), max(keys)

    def positions(self) -> torch.Tensor:
        """(N/cp,) each own token's position in its document."""
        return self._numbers - self.cu_seqlens[self._documents]

    def lengths(self) -> torch.Tensor:
        """(N/cp,) the length of each own token's document."""
        return self.cu_seqlens.diff()[self._documents]

    @cached_property
    def _numbers(self) -> torch.Tensor:
        """(N/cp,) which tokens of the micro-batch are this rank's."""
        return torch.cat([torch.arange(own.start, own.stop, device=self.cu_seqlens.device) for own in self.own])

    @cached_property
    def _documents(self) -> torch.Tensor:
        """(N/cp,) the number of each own token's document."""
        return torch.searchsorted(self.cu_seqlens, self._numbers, right=True, out_int32=True) - 1

    def _ends(self, sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=self.cu_seqlens.device)

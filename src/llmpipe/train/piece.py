"""A rank's part of a tensor, as a training checkpoint holds it."""

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Piece(torch.Tensor):
    """A rank's part of a full tensor, for torch.distributed.checkpoint: any offset, any size, copies allowed.

    It speaks the protocol that DTensor speaks there (`_Checkpointable`). DTensor itself cannot say
    that two tp ranks hold the same KV head, or that the last vocabulary slice is shorter.
    """

    local: torch.Tensor
    offsets: torch.Size

    @staticmethod
    def __new__(cls, local: torch.Tensor, full_shape: tuple[int, ...], offsets: tuple[int, ...]) -> "Piece":
        piece = torch.Tensor._make_wrapper_subclass(cls, torch.Size(full_shape), dtype=local.dtype, device=local.device)
        piece.local, piece.offsets = local, torch.Size(offsets)
        return piece

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise RuntimeError(f"a Piece is only for checkpoints, but {function} was called on it")

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        if not self.local.numel():
            return []
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(self.offsets, self.local.size()),
            properties=TensorProperties(dtype=self.local.dtype),
            size=self.size(),
        )
        index = MetadataIndex(fqn, self.offsets)
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(self.offsets, self.local.size())] if self.local.numel() else []

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        return self.local

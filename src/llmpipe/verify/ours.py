"""Our own decoder as a side of the comparison: the one that meets transformers where the source is Hugging Face's."""

from pathlib import Path

import torch
from torch.nn import functional as F

from llmpipe.checkpoint.formats import open_source
from llmpipe.model.layer import Layer, norm_of
from llmpipe.model.packed import Packed
from llmpipe.model.rope import rope_table
from llmpipe.parallel.groups import TensorParallel


class OurModel:
    """A checkpoint or rank files run block by block in fp32 by the layers that train, one block in memory at a time."""

    kind = "llmpipe"

    def __init__(self, path: Path):
        self.path = path
        self.source = open_source(path)
        self.shape = self.source.shape
        self.num_layers = self.shape.num_layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self.source.read("embedding.weight")[tokens].float()

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""
        with torch.device("meta"):
            module = Layer(self.shape, TensorParallel(), layer)
        names = {name: f"layers.{layer}.{name}" for name in module.state_dict()}
        module.load_state_dict({name: self.source.read(key).float() for name, key in names.items()}, assign=True)
        rows, length = positions.shape
        packed = Packed(torch.arange(0, rows * length + 1, length, dtype=torch.int32))  # each row is a document
        lengths = positions.max(dim=1, keepdim=True).values + 1  # (B, 1)
        cos, sin = rope_table(positions.flatten(), lengths.expand_as(positions).flatten(), self.shape)
        return module(hidden.flatten(0, 1), cos, sin, packed).view_as(hidden)  # (B * T, C) within

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        name = "embedding.weight" if self.shape.tie_embeddings else "head.weight"
        with torch.device("meta"):
            norm = norm_of(self.shape)
        norm.load_state_dict({key: self.source.read(f"norm.{key}").float() for key in norm.state_dict()}, assign=True)
        return F.linear(norm(hidden), self.source.read(name).float())

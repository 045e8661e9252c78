"""Logits of a model split over tp × pp ranks: every rank calls together, every rank gets them all.

B rows of T tokens, N = B·T padded up to a multiple of tp, H hidden, V vocabulary.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from llmpipe.families import ONE_STAGE
from llmpipe.layout import Layout, Stages
from llmpipe.model.decoder import Decoder
from llmpipe.model.load import load_decoder
from llmpipe.parallel.collectives import all_gather_rows
from llmpipe.parallel.groups import Groups, TensorParallel, make_groups
from llmpipe.parallel.processes import run_ranks


class Engine:
    """A model to ask for logits, in one process (`groups` None) or on each rank of a layout."""

    def __init__(self, model: list[Decoder], groups: Groups | None, device: torch.device):
        self.model, self.groups, self.device = model, groups, device
        self.shape, self.tp = model[0].shape, groups.tp if groups else TensorParallel()

    @classmethod
    def open(
        cls, path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", groups: Groups | None = None
    ) -> "Engine":
        """Load a checkpoint or rank files (of any layout); with `groups`, this rank's part."""
        where = torch.device(device)
        if groups is None:
            return cls([*load_decoder(path, TensorParallel(), ONE_STAGE, 0, dtype, where)], None, where)
        model = load_decoder(path, groups.tp, groups.layout.stages, groups.at.pp, dtype, where)
        return cls([*model], groups, where)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids → (B, T, V) fp32, each row a document of its own."""
        num_rows, length = tokens.shape
        num_tokens = num_rows * length
        padding = -num_tokens % self.tp.size
        flat = F.pad(tokens.to(self.device).flatten(), (0, padding))  # (N,)
        bounds = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=self.device)
        bounds = F.pad(bounds, (0, 1), value=num_tokens + padding)  # the padding is a document of its own
        out = self._through_stages(flat, bounds)  # (N, V)
        return out[:num_tokens].unflatten(0, (num_rows, length))

    def _through_stages(self, flat: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        """Each stage waits for the one before; the last one's logits go to all."""
        if self.groups is None or self.groups.layout.pp == 1:
            return self._full_vocabulary(self.model[0](flat, bounds))
        groups, last = self.groups, self.groups.layout.pp - 1
        for stage in self.model:
            x = flat if stage.is_first else self._receive(len(flat))  # (N,) or (N/tp, H)
            x = stage(x, bounds)
            if not stage.is_last:
                dist.send(x.contiguous(), group=groups.pp, group_dst=(groups.at.pp + 1) % groups.layout.pp)
        if groups.is_last_stage:
            out = self._full_vocabulary(x)
        else:
            out = torch.empty(len(flat), self.shape.vocab, device=self.device)
        dist.broadcast(out, group=groups.pp, group_src=last)
        return out

    def _receive(self, num_tokens: int) -> torch.Tensor:
        """(N/tp, H) of the stage before, which is on the rank before; of the last rank where this is the first."""
        assert self.groups
        groups, dtype = self.groups, next(self.model[0].parameters()).dtype
        x = torch.empty(num_tokens // groups.layout.tp, self.shape.hidden, dtype=dtype, device=self.device)
        dist.recv(x, group=groups.pp, group_src=(groups.at.pp - 1) % groups.layout.pp)
        return x

    def _full_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """(N, V/tp) of each rank, the last ones fewer → (N, V) fp32 on all tp ranks."""
        tp, vocab = self.tp, self.shape.vocab
        logits = logits.float()
        if tp.size == 1:
            return logits
        short = -(-vocab // tp.size) - logits.shape[-1]
        by_row = F.pad(logits, (0, short)).t()  # (ceil(V/tp), N)
        return all_gather_rows(by_row, tp)[:vocab].t().contiguous()


def rank_logits(
    path: Path, tokens: torch.Tensor, tp: int, stages: Stages, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(B, T) ids → (B, T, V) logits of the sharded model, run in tp·pp gloo processes on this machine."""
    return torch.from_numpy(run_ranks(_rank_logits, tp * stages.pp, path, tokens, tp, stages, dtype)[0])


def _rank_logits(path: Path, tokens: torch.Tensor, tp: int, stages: Stages, dtype: torch.dtype) -> np.ndarray | None:
    """One rank of `rank_logits`; arrays, unlike tensors, outlive the process that sends them."""
    layout = Layout(
        tp=tp, pp=stages.pp, vp=stages.vp, pp_layers=[*stages.layers], gpus_per_node=tp * stages.pp, device="cpu"
    )
    groups = make_groups(layout.resolved(), torch.device("cpu"))
    logits = Engine.open(path, dtype, "cpu", groups).logits(tokens)
    return logits.numpy() if dist.get_rank() == 0 else None

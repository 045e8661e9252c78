"""data_parallel_memory.py: the most that a rank's tensors take in a step, for each kind of data parallelism, beside the
formulas of docs/layouts.md, in bytes a parameter of its stage. Prints the table of docs/numbers/data_parallel.md.

Storages that live are counted after each operation of the second step. The model is random and its texts are short,
so that activations are small.
"""

import platform
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from finetune_inputs import TINY, make_data, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmpipe.layout import Layout
from llmpipe.parallel.data import local
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe
from llmpipe.train.job import Job
from llmpipe.train.setup import Trainer, prepare

BUCKET = 128 << 20
SHAPE = replace(TINY, num_layers=8, hidden=256, num_kv_heads=4, head_dim=64, ffn=512, vocab=1021)
KINDS: dict[str, dict[str, Any]] = {
    "full, 4 ranks": {"dp": 4},
    "optimizer, 4 ranks": {"dp": 4, "data_parallel": "optimizer"},
    "plain, 2 ranks": {"dp": 2, "data_parallel": "plain"},
    "hybrid, 2 nodes of 2": {"dp": 4, "data_parallel": "hybrid", "nodes": 2},
    "full, 2 ranks a stage, PP2": {"dp": 2, "pp": 2},
}


class Live(TorchDispatchMode):
    """The most bytes that the storages it has met take at once."""

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.met: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.most = 0
        self._meet(tensors)

    def _meet(self, values: Iterable[Any]) -> None:
        for tensor in values:
            if isinstance(tensor, torch.Tensor):
                storage = local(tensor).untyped_storage()
                self.met[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._meet(tree_leaves((args, kwargs, made)))
        self.met = {key: met for key, met in self.met.items() if met() is not None}
        self.most = max(self.most, sum(storage.nbytes() for met in self.met.values() if (storage := met())))
        return made


def step(trainer: Trainer, number: int) -> None:
    trainer.pipeline.forward_backward(trainer.loader.step(number), torch.ones(()))
    trainer.optimizer.reduce_and_clip()
    trainer.optimizer.adamw.step()
    trainer.optimizer.adamw.zero_grad()
    trainer.optimizer.into_model()


def most_and_sizes(job: Job) -> tuple[int, int, int, int]:
    """A rank's peak in bytes; its parameters, those of a layer, those of embedding, head and norm."""
    trainer = prepare(job)
    step(trainer, 0)
    state = [value for of_one in trainer.optimizer.adamw.state.values() for value in of_one.values()]
    live = Live([*trainer.model.parameters(), *trainer.optimizer.parameters.values(), *state])
    with live:
        step(trainer, 1)
    sizes = {key: p.numel() for key, p in trainer.model.named_parameters()}
    layer_sizes = Counter[str]()
    for key, size in sizes.items():
        layer_sizes[key.split(".")[1] if key.startswith("layers.") else "rest"] += size
    rest = layer_sizes.pop("rest")
    return live.most, sum(sizes.values()), max(layer_sizes.values()), rest


def formula(job: Job, parameters: int, layer: int, rest: int) -> float:
    """What docs/layouts.md says, bytes."""
    layout, compute, gradient = job.layout, 2 if job.recipe.precision == "bf16" else 4, 4
    micro_batches = job.recipe.global_batch // (layout.dp * layout.micro_batch)
    if layout.data_parallel == "plain":
        copy = compute * parameters if compute == 2 else 0
        return 12 * parameters + copy + gradient * parameters + min(BUCKET, gradient * parameters)
    summed = gradient * parameters / (layout.shards if micro_batches == 1 or layout.gathers_again else 1)
    if layout.data_parallel == "optimizer" or layout.pp > 1:
        return 12 * parameters / layout.shards + summed + compute * parameters + (compute + gradient) * layer
    return 12 * parameters / layout.shards + summed + compute * rest + (3 * compute + gradient) * layer


def main() -> None:
    print("| kind | precision | micro-batches | measured | formula |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        model, data = Path(name) / "model", Path(name) / "data"
        make_model(model, SHAPE, torch.float32)
        make_data(data, SHAPE.vocab, 6000, document=30)
        for kind, given in KINDS.items():
            layout = Layout(device="cpu", **given)
            ranks = layout.dp * layout.pp
            layout = replace(layout, gpus_per_node=ranks // layout.nodes).resolved()
            for precision in ("bf16", "fp32"):
                for count in (1, 4) if layout.pp == 1 else (4,):
                    recipe = Recipe(seq_len=16, global_batch=count * layout.dp, steps=2, lr=1e-3, precision=precision)
                    job = Job(
                        recipe=recipe, layout=layout, model=str(model), data={str(data): 1.0}, split=[1.0, 0.0, 0.0],
                        output=name,
                    )  # fmt: skip
                    most, *sizes = run_ranks(most_and_sizes, ranks, job)[0]
                    figures = f"{most / sizes[0]:.1f} | {formula(job, *sizes) / sizes[0]:.1f}"
                    print(f"| {kind} | {precision} | {count} | {figures} |", flush=True)
    print(f"\n{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}.")


if __name__ == "__main__":
    main()

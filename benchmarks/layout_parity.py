"""layout_parity.py: 20 steps of a tiny Llama in fp32 in each layout; the largest relative difference of loss and of
gradient norm from one process, and of weights (relative L2 of the worst tensor). Prints docs/numbers/layout_parity.md.

The model is random, the text is numbers. The first row is the noise of one process with another micro-batch.
"""

import json
import platform
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.data.dataset.indexed import Writer
from llmpipe.layout import Layout
from llmpipe.parallel.processes import run_ranks
from llmpipe.recipe import Recipe, Schedule
from llmpipe.train.job import Job
from llmpipe.train.loop import train

VOCAB = 1021
RECIPE = Recipe(
    seq_len=64, global_batch=16, steps=20, lr=1e-3, schedule=Schedule(warmup=4), precision="fp32", save_every=20
)
LAYOUTS = {
    "1 process, micro-batch 1": {"micro_batch": 1},
    "TP2": {"tp": 2},
    "TP4, 2 KV heads": {"tp": 4},
    "PP2": {"pp": 2},
    "DP2": {"dp": 2},
    "TP2 x PP2": {"tp": 2, "pp": 2},
    "TP2 x PP2 x DP2": {"tp": 2, "pp": 2, "dp": 2},
    "CP2": {"cp": 2},
    "CP4": {"cp": 4},
    "CP2 x DP2": {"cp": 2, "dp": 2},
    "CP2 x TP2": {"cp": 2, "tp": 2},
    "CP2 x PP2": {"cp": 2, "pp": 2},
}


def make_inputs(folder: Path, documents: int = 1000, **sizes: int) -> tuple[Path, Path]:
    """A random model, grouped-query unless `sizes`, of LlamaConfig, say otherwise; documents of 5 to 60 tokens."""
    torch.manual_seed(0)
    given = sizes or {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 8,
                      "num_key_value_heads": 2}  # fmt: skip
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, **given)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    manifest.write(folder / "model", "checkpoint", {})
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, documents).astype(np.int32)
    with Writer(folder / "data", np.dtype(np.uint16)) as writer:
        writer.add(rng.zipf(1.3, lengths.sum()) % VOCAB, lengths)
    return folder / "model", folder / "data"


def run(model: Path, data: Path, output: Path, layout: dict[str, int]) -> tuple[np.ndarray, np.ndarray, Path]:
    """Losses and gradient norms of 20 steps, and the trained weights."""
    made = Layout(device="cpu", **({"micro_batch": 4} | layout))
    made = replace(made, gpus_per_node=made.tp * made.pp * made.cp * max(made.dp, 1)).resolved()
    output.mkdir()
    job = Job(recipe=RECIPE, layout=made, model=str(model), data={str(data): 1.0}, split=[90, 5, 5], output=str(output))
    run_ranks(train, made.processes, job)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses, norms = (np.array([line[key] for line in lines]) for key in ("loss", "grad_norm"))
    return losses, norms, output / "weights"


def worst_tensor(ours: Path, theirs: Path) -> float:
    """The largest relative L2 difference of a tensor."""
    a, b = open_source(ours), open_source(theirs)
    return max(float((a.read(key) - b.read(key)).norm() / b.read(key).norm()) for key in b.keys())  # noqa: SIM118


def main() -> None:
    print("| layout | loss | gradient norm | weights |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = make_inputs(folder)
        losses, norms, weights = run(model, data, folder / "single", {})
        for i, (label, layout) in enumerate(LAYOUTS.items()):
            other_losses, other_norms, other_weights = run(model, data, folder / str(i), layout)
            loss, norm = (np.abs(o / s - 1).max() for o, s in ((other_losses, losses), (other_norms, norms)))
            print(f"| {label} | {loss:.1e} | {norm:.1e} | {worst_tensor(other_weights, weights):.1e} |", flush=True)
    print(f"\nThe loss falls from {losses[0]:.4f} to {losses[-1]:.4f}.", end=" ")
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__}.")


if __name__ == "__main__":
    main()

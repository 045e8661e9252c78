"""What each step tells: one JSON line in RUN/live.jsonl, which becomes metrics.jsonl when the run has ended.

    {"step": 1, "loss": 6.9, "perplexity": 992.3, "accuracy": 0.02, "assistant_accuracy": 0.03, "lr": 1e-4,
     "grad_norm": 0.8, "loss_scale": 1.0, "skipped": null, "skipped_steps": 0, "tokens": 2048, "epoch": 0.01,
     "tokens_per_second": 31000.0, "tokens_per_second_per_gpu": 3875.0, "mfu_full": 0.44, "mfu_causal": 0.41,
     "memory_bytes": 1234, "seconds": 0.07, "time": 1767225600.0,
     "eval_loss": 6.8, "eval_perplexity": 897.8, "eval_accuracy": 0.03, "eval_seconds": 0.5}

`accuracy` is the share of trained tokens that the model found likeliest, `assistant_accuracy` that of the assistant's
in chats. `epoch` is how often the dataset that comes round the most often has been seen. `mfu_full` and `mfu_causal`
are the model's arithmetic per second over the devices' peaks, in the two conventions of `flops_per_token`. What begins
with `eval_` is of held-out documents, in the steps after which they were looked at (train/evaluation.py).
`loss_scale` is 1 but in fp16. A step that was not taken says why in `skipped` (train/faults.py), null of all others;
`skipped_steps` counts them. Its loss or norm is null where it is no number or was not computed.
`tokens` counts whole sequences from the run's start, `tokens_per_second` what went through the model: less where chats
are not packed, none in a step that was asked to be skipped. `memory_bytes` is the peak of the fullest rank. Each
checkpoint keeps the lines up to it, and a resumed run goes on from those: every step stands there once, whatever
happened. `time` is when the step ended, in seconds since 1970.
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmpipe.checkpoint.convert import DTYPES
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, layer_of
from llmpipe.files import write_text
from llmpipe.parallel.groups import Groups
from llmpipe.progress import Progress
from llmpipe.train.batches import Batches
from llmpipe.train.faults import ROLLED_BACK
from llmpipe.train.job import Job
from llmpipe.train.line_file import LineFile
from llmpipe.train.tally import perplexity

# Dense bf16 peaks in FLOP/s, from the vendors' data sheets; those with a longer name go first.
PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "L40S": 362e12, "A40": 150e12,
}  # fmt: skip


def flops_per_token(shape: Shape, seq_len: int, causal: bool) -> float:
    """Forward and backward arithmetic of one token: 6 · matrix parameters + 12 · heads · head_dim · Σ tokens seen.

    The sum is over layers. Full, a token sees all seq_len tokens: the convention of PaLM (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B) and of Megatron-LM (Narayanan et al. 2021), in which MFU is mostly published. Causal,
    it sees half of the text on average, less in layers with a window: what is really computed, where documents are as
    long as the sequence. The embedding is looked up and the head multiplied, tied or not, as Megatron-LM counts; PaLM
    counts the embedding too. Recomputation counts in neither.
    """
    keys = FAMILIES[shape.family].keys(shape)
    head = "embedding.weight" if shape.tie_embeddings else "head.weight"
    matrices = [row for key, row in keys.items() if len(row.dims) == 2 and (key == head or layer_of(key) is not None)]
    layers = range(shape.num_layers)
    seen = sum(_mean_seen(seq_len, shape.window_of(layer)) if causal else seq_len for layer in layers)
    return 6.0 * sum(math.prod(row.shape(shape)) for row in matrices) + 12.0 * shape.num_heads * shape.head_dim * seen


def _mean_seen(seq_len: int, window: int | None) -> float:
    """The tokens that a token of a text sees on average: those before it, at most `window`."""
    most = min(window or seq_len, seq_len)
    return most * (1 - most / (2 * seq_len))


def known_peak(name: str) -> float | None:
    """A GPU's peak by its name; None for one that is not known, as an A4000, which is no A40."""
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """A device's peak in FLOP/s: a known GPU's from its data sheet, else what products of this type reach here."""
    if device.type == "cuda" and (peak := known_peak(torch.cuda.get_device_name(device))):
        return peak
    size, best = 8192 if device.type == "cuda" else 768, float("inf")
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(5):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_bytes(device: torch.device) -> int:
    """This process's peak: of the GPU's allocator, or of resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def seconds_of(metrics: Path) -> float:
    """What all steps took together with their evaluations, whichever attempt took them."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return sum(line["seconds"] + line.get("eval_seconds", 0.0) for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step was like."""

    number: int
    loss: float
    grad_norm: float
    """Before clipping; NaN, as the loss, where it was not computed."""
    lr: float
    loss_scale: float
    skipped: str | None
    """Why it was not taken."""
    skipped_steps: int
    """So far."""
    measured: dict[str, float | None]
    """Accuracies, and what an evaluation found."""
    tokens: int
    """That went through the model."""
    memory: int
    """Bytes."""
    seconds: float


class Recorder:
    """The metrics: the file, the bar, a line in the log now and then; rank 0's, the others' does nothing."""

    def __init__(self, job: Job, shape: Shape, groups: Groups, epoch_of: Callable[[int], float], first_step: int):
        """`epoch_of`: how often the data has been seen after so many samples."""
        self.is_lead = dist.get_rank() == 0
        if not self.is_lead:
            return
        recipe, self.world_size = job.recipe, job.layout.processes
        self.batches, self.seq_len = Batches(recipe), recipe.seq_len
        self.epoch_of = epoch_of
        self.flops = {name: flops_per_token(shape, recipe.seq_len, name == "causal") for name in ("full", "causal")}
        self.peak = peak_flops(groups.device, DTYPES[recipe.precision])
        self.lines = LineFile(job.live)
        self.bar = Progress("finetune", recipe.steps, "steps")
        self.bar.add(first_step)

    def add(self, step: Step) -> None:
        """One step's line."""
        if not self.is_lead:
            return
        rate = step.tokens / step.seconds
        self.lines.add(self._line(step, rate))
        self.bar.add(1, f"loss {step.loss:.4f}, {rate:,.0f} tokens/s")

    def _line(self, step: Step, rate: float) -> dict[str, Any]:
        samples, per_gpu = self.batches.before(step.number), rate / self.world_size
        return {
            "step": step.number,
            "loss": step.loss if math.isfinite(step.loss) else None,
            "perplexity": perplexity(step.loss),
            **step.measured,
            "lr": step.lr,
            "grad_norm": step.grad_norm if math.isfinite(step.grad_norm) else None,
            "loss_scale": step.loss_scale,
            "skipped": step.skipped,
            "skipped_steps": step.skipped_steps,
            "tokens": samples * self.seq_len,
            "epoch": round(self.epoch_of(samples), 4),
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_gpu": round(per_gpu, 1),
            **{f"mfu_{name}": round(per_gpu * each / self.peak, 4) for name, each in self.flops.items()},
            "memory_bytes": step.memory,
            "seconds": round(step.seconds, 6),
            "time": round(time.time(), 3),
        }

    def pass_over(self, step: int) -> None:
        """The weights are those after `step` again: the steps since then are skipped, whatever they were."""
        if not self.is_lead:
            return
        lines = self.lines.read()
        skipped_steps = lines[step - 1]["skipped_steps"]
        for line in lines[step:]:
            skipped_steps += 1
            line |= {"skipped": line["skipped"] or ROLLED_BACK, "skipped_steps": skipped_steps}
        write_text(self.lines.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.lines = LineFile(self.lines.path)

    def close(self) -> None:
        """The end; UserError where the disk does not take the last lines."""
        if not self.is_lead:
            return
        self.bar.close()
        try:
            self.lines.write()
        except OSError as error:
            raise UserError(
                f"{self.lines.path} is not written: {error.strerror}: make room, then run finetune again, which goes on"
                " from its last checkpoint"
            ) from error

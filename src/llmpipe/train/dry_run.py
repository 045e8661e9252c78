"""`llmpipe finetune --dry-run`: what would be trained how, what it would take, and what the first step would read."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from llmpipe.checkpoint.formats import open_source
from llmpipe.data.batches.batch import Batch
from llmpipe.data.mask import MOST_TOKENS, marked
from llmpipe.data.tokenizer import find_tokenizer, open_tokenizer
from llmpipe.data.tokenizers.base import Tokenizer
from llmpipe.families import Shape
from llmpipe.layout import Coordinates, Layout
from llmpipe.train.estimate import estimate
from llmpipe.train.job import Job
from llmpipe.train.setup import open_blend, open_loader

GIB = 1 << 30


def told(job: Job, colours: bool) -> str:
    """The text; what is trained is in colour or in brackets."""
    shape = open_source(Path(job.model)).shape
    # A step of one micro-batch, which is no rank's part: a ramp's first step may not deal out to the ranks of a rerun.
    recipe = replace(job.recipe, global_batch=job.layout.micro_batch, batch_ramp=None)
    first = replace(job, recipe=recipe, layout=replace(job.layout, dp=1, cp=1))
    blend = open_blend(job)
    loader = open_loader(first, Coordinates(dp=0, cp=0, pp=0, tp=0), blend)
    parts = [
        _layout(job.layout, shape),
        _arithmetic(job, len(blend), blend.epoch(len(blend))),
        _memory(job, shape),
        _first_batch(job, loader.step(0), colours),
    ]
    return "\n\n".join(parts)


def _layout(layout: Layout, shape: Shape) -> str:
    schedule = f", {layout.pp_schedule}" if layout.pp > 1 else ""
    lines = [
        f"layout: {layout.nodes} x {layout.gpus_per_node} {layout.device} processes = tp {layout.tp} x pp"
        f" {layout.pp} x cp {layout.cp} x dp {layout.dp}{schedule}, data parallel: {layout.data_parallel}"
    ]
    if layout.pp > 1:
        for rank in range(layout.pp):
            runs = " and ".join(f"{run.start} to {run.stop - 1}" for run in layout.stages.runs(shape.num_layers, rank))
            lines.append(f"  pipeline rank {rank}: layers {runs}")
    return "\n".join(lines)


def _arithmetic(job: Job, samples: int, epochs: float) -> str:
    """The batch as a sentence."""
    recipe, layout = job.recipe, job.layout
    each = recipe.global_batch // layout.dp
    ramp = " (fewer at the start, by batch_ramp)" if samples < recipe.steps * recipe.global_batch else ""
    return (
        f"A step takes {recipe.global_batch:,} sequences{ramp} of {recipe.seq_len:,} tokens ="
        f" {recipe.global_batch * recipe.seq_len:,} tokens: each of {layout.dp} data-parallel ranks takes {each:,} of"
        f" them, in {each // layout.micro_batch:,} micro-batches of {layout.micro_batch:,}. {recipe.steps:,} steps take"
        f" {samples * recipe.seq_len:,} tokens: {epochs:.2f} epochs of the data that comes round the most often."
    )


def _memory(job: Job, shape: Shape) -> str:
    """A line for each pipeline rank."""
    layout = job.layout
    num_micro_batches = job.recipe.global_batch // (layout.dp * layout.micro_batch)
    kinds = "parameters + gathered ones + gradients + optimizer state + activations = total"
    lines = [f"memory of a rank, an estimate, in GiB: {kinds}"]
    for rank in range(layout.pp):
        need = estimate(shape, job.recipe, layout, rank, num_micro_batches)
        parts = need.parameters, need.gathered, need.gradients, need.optimizer, need.activations
        numbers = " + ".join(f"{part / GIB:.3g}" for part in parts)
        lines.append(f"  pipeline rank {rank}: {numbers} = {need.total / GIB:.3g}")
    return "\n".join(lines)


def _first_batch(job: Job, batch: Batch, colours: bool) -> str:
    """The first micro-batch of the first step, as text."""
    path = find_tokenizer(Path(job.model))
    (tokens,), (labels,), (weights,) = (batch.by_micro_batch(name)[:1] for name in ("tokens", "labels", "weights"))
    num_trained, length = int((weights > 0).sum()), weights.numel()
    head = f"the first micro-batch: {length:,} tokens, {num_trained:,} of them trained"
    if path is None:
        return f"{head}; {job.model} has no tokenizer to show them with"
    tokenizer = open_tokenizer(Path(job.model))
    shown, left = [head + (", green" if colours else ", in ⟦brackets⟧")], MOST_TOKENS
    for start, end in _documents(batch.cu_seqlens[0], weights):
        if left <= 0:
            shown.append("…")
            break
        end = min(end, start + left)
        left -= end - start
        shown.append(_text(tokens[start:end], labels[end - 1], weights[start:end], tokenizer, colours))
    return "\n--\n".join(shown)


def _documents(bounds: torch.Tensor, weights: torch.Tensor) -> list[tuple[int, int]]:
    """Where documents start and end; what fills a row up, in which nothing is trained, is none."""
    places = sorted(set(bounds.tolist()))
    return [(start, end) for start, end in pairwise(places) if weights[start:end].any()]


def _text(
    tokens: torch.Tensor, last_label: torch.Tensor, weights: torch.Tensor, tokenizer: Tokenizer, colours: bool
) -> str:
    """A document: its first token is not predicted, its last one may be a label only."""
    ids, trained = [*tokens.tolist(), int(last_label)], [False, *(weights > 0).tolist()]
    if not trained[-1]:  # the next document's first token
        ids, trained = ids[:-1], trained[:-1]
    return marked(ids, trained, tokenizer, colours)

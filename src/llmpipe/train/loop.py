"""The training loop of one rank."""

import logging
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.model.dropout import micro_batch_seeds
from llmpipe.parallel.groups import Groups
from llmpipe.parallel.pipeline import forward_backward
from llmpipe.train import state
from llmpipe.train.determinism import use_deterministic_kernels
from llmpipe.train.job import Job
from llmpipe.train.metrics import Recorder, memory_bytes
from llmpipe.train.publish import publish
from llmpipe.train.schedule import learning_rate
from llmpipe.train.setup import Trainer, prepare

log = logging.getLogger(__name__)


def train(job: Job) -> bool:
    """Train the job to its end, or until it is asked to stop; True if it is finished and published."""
    if job.recipe.deterministic:
        use_deterministic_kernels()
    trainer = prepare(job)
    first_step = state.resume(job, trainer.optimizer)
    start = time.monotonic()
    finished = run_steps(trainer, first_step)
    if finished:
        tokens = job.recipe.steps * job.recipe.global_batch * job.recipe.seq_len
        summary = {"steps": job.recipe.steps, "tokens": tokens, "seconds": round(time.monotonic() - start, 3)}
        publish(job, trainer.model, trainer.model.shape, trainer.groups, summary)
    return finished


def run_steps(trainer: Trainer, first_step: int) -> bool:
    """The loop: fetch, forward and backward, clip, step, log, save; False when RUN/stop ended it early."""
    job, recipe = trainer.job, trainer.job.recipe
    optimizer, scale = trainer.optimizer, trainer.optimizer.scale
    lead = dist.get_rank() == 0
    metrics = Recorder(job, trainer.model.shape, trainer.groups, first_step) if lead else None
    for step in range(first_step, recipe.steps):
        start = time.perf_counter()
        batch = trainer.loader.step(step).to(trainer.groups.device)
        total_weight = global_weight(batch.weights, trainer.groups) / scale.value
        seeds = dropout_seeds(trainer, step, batch.tokens.shape[0])
        loss = forward_backward(trainer.model, trainer.schedule, trainer.groups, batch, total_weight, seeds)
        loss = global_loss(loss, trainer.groups) / scale.value
        grad_norm = optimizer.reduce_and_clip()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite and not scale.can_shrink:  # before the weights take it, and a checkpoint them
            raise UserError(
                f"step {step + 1}: the loss is {loss}, the gradient's norm {grad_norm}; a rerun goes on from the last"
                " checkpoint and ends here again unless the recipe changes: lower lr, or look at this step's data"
            )
        lr = learning_rate(recipe, step)
        if finite:
            optimizer.step(lr)
        else:
            optimizer.skip()
        memory = most_memory(trainer.groups)
        if metrics:
            seconds = time.perf_counter() - start
            metrics.add(step + 1, loss, lr, grad_norm, memory, seconds, scale.value, optimizer.skipped_steps)
        scale.update(finite)
        stop = asked_to_stop(job.run)
        if stop or (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            state.save(job, step + 1, optimizer)
        if stop and step + 1 < recipe.steps:
            log.info("stopped as asked after step %s: a rerun goes on from there", step + 1)
            return False
    if metrics:
        metrics.close()
    return True


def dropout_seeds(trainer: Trainer, step: int, num_micro_batches: int) -> torch.Tensor | None:
    """(M,) the seeds of this rank's micro-batches; None where nothing is dropped."""
    recipe = trainer.job.recipe
    if not (recipe.dropout.hidden or recipe.dropout.attention):
        return None
    return micro_batch_seeds(recipe.seed, step, trainer.groups.at, num_micro_batches)


def global_weight(weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Σ w over the whole global batch, (); 1 for a batch without trained tokens, whose gradient is then 0."""
    total = weights.sum()
    dist.all_reduce(total, group=groups.data)
    return torch.where(total > 0, total, 1.0)


def global_loss(loss: torch.Tensor, groups: Groups) -> float:
    """Σ w·ℓ / Σ w from each rank's share; the tp ranks of a stage all have the same share."""
    total = loss / groups.layout.tp
    dist.all_reduce(total)
    return total.item()


def most_memory(groups: Groups) -> int:
    """The peak of the fullest rank, in bytes."""
    peak = torch.tensor(memory_bytes(groups.device), device=groups.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def asked_to_stop(run: Path) -> bool:
    """Is there a file RUN/stop? Rank 0 looks and all hear, for all have to leave after the same step."""
    stop = [dist.get_rank() == 0 and (run / "stop").exists()]
    dist.broadcast_object_list(stop, src=0)
    return stop[0]

"""The training loop of one rank."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llmpipe.errors import UserError
from llmpipe.model.dropout import micro_batch_seeds
from llmpipe.parallel.compat import set_timeouts
from llmpipe.parallel.groups import Groups
from llmpipe.train import lease, state
from llmpipe.train.determinism import deterministic_kernels
from llmpipe.train.faults import ASKED
from llmpipe.train.job import Job
from llmpipe.train.metrics import Recorder, Step, memory_bytes
from llmpipe.train.publish import publish
from llmpipe.train.replicas import check_replicas
from llmpipe.train.saver import Saver
from llmpipe.train.schedule import learning_rate, weight_decay
from llmpipe.train.setup import Trainer, prepare

HANG = 0.9
"""The share of timeout_minutes after which a rank says that another one hangs, before NCCL ends it."""
log = logging.getLogger(__name__)


def train(job: Job) -> bool:
    """Train the job to its end, or until it is asked to stop; True if it is finished and published."""
    with deterministic_kernels() if job.recipe.deterministic else nullcontext():
        return _train(job)


def _train(job: Job) -> bool:
    trainer = prepare(job)
    set_timeouts(timedelta(minutes=job.timeout_minutes))
    first_step = state.resume(job, trainer.optimizer, trainer.watch)
    finished = run_steps(trainer, first_step)
    if finished:
        check_lease(job)
        publish(job, trainer.model, trainer.model.shape, trainer.groups)
    return finished


def run_steps(trainer: Trainer, first_step: int) -> bool:
    """The loop: step, evaluate, tell, save; False when RUN/stop or exit_at_step ended it early."""
    job, recipe, observer = trainer.job, trainer.job.recipe, trainer.observer
    metrics = Recorder(job, trainer.model.shape, trainer.groups, trainer.blend.epoch, first_step)
    saver = Saver(job, trainer.optimizer, trainer.watch)
    observer.resume(first_step)
    done, end, stop = first_step, min(recipe.steps, job.exit_at_step or recipe.steps), False
    while done < end and not stop:
        observer.begin(done + 1)
        told = take_step(trainer, done)
        done += 1
        if trainer.evaluation and is_due(recipe.eval_every, done):
            told.measured.update(trainer.evaluation.run(trainer.model, lambda: has_to_stop(job)))
            observer.lap("evaluate")
        stop, save = orders(job, saver.minutes)
        metrics.add(told)
        if trainer.watch.has_to_go_back:
            go_back(trainer, done, saver, metrics)
        save |= stop or done == end or is_due(recipe.save_every, done) or is_due(recipe.milestones, done)
        if recipe.check_replicas_every and (save or is_due(recipe.check_replicas_every, done)):
            saver.wait()  # else a failed check would end the ranks with the checkpoint of an earlier step half written
            check_replicas(trainer.optimizer, done)  # before a checkpoint, which could not be gone on from
        if save:
            saver.save(done)
        observer.lap("save")
        observer.end(done)
    observer.close()
    saver.wait()
    metrics.close()
    if done < recipe.steps:
        log.info("stopped as asked after step %s: a rerun goes on from step %s", done, saver.saved or first_step)
    return done == recipe.steps


def take_step(trainer: Trainer, step: int) -> Step:
    """Gradient and optimizer, or neither where the step is skipped."""
    recipe, optimizer, scale = trainer.job.recipe, trainer.optimizer, trainer.optimizer.scale
    start, lr, loss_scale = time.perf_counter(), learning_rate(recipe, step), scale.value
    loss, grad_norm, skipped = math.nan, math.nan, ASKED
    if step + 1 not in recipe.skip_steps:
        loss, grad_norm = gradient(trainer, step)
        skipped = trainer.watch.judge(step + 1, loss, grad_norm, scale.can_shrink)
        if math.isfinite(loss):
            scale.update(math.isfinite(grad_norm))
    if skipped:
        optimizer.skip()
    else:
        optimizer.step(lr, weight_decay(recipe, step))
    memory, (measured, tokens) = most_memory(trainer.groups), trainer.tally.take()
    seconds = time.perf_counter() - start
    trainer.observer.lap("optimizer")
    return Step(
        number=step + 1, loss=loss, grad_norm=grad_norm, lr=lr, loss_scale=loss_scale, skipped=skipped,
        skipped_steps=optimizer.skipped_steps, measured=measured, tokens=tokens, memory=memory, seconds=seconds,
    )  # fmt: skip


def gradient(trainer: Trainer, step: int) -> tuple[float, float]:
    """Fetch a step's samples, forward and backward; its loss, and the norm of the gradient, now reduced."""
    groups, scale = trainer.groups, trainer.optimizer.scale
    batch = trainer.loader.step(step).to(groups.device)
    trainer.observer.lap("data")
    total_weight = global_weight(batch.weights, groups) / scale.value
    seeds = dropout_seeds(trainer, step, batch.tokens.shape[0])
    loss = trainer.pipeline.forward_backward(batch, total_weight, seeds)
    trainer.tally.add(trainer.model, batch)
    trainer.observer.lap("forward_backward")
    loss = global_loss(loss, groups, timedelta(minutes=HANG * trainer.job.timeout_minutes)) / scale.value
    grad_norm = trainer.optimizer.reduce_and_clip()
    trainer.observer.lap("reduce")
    return loss, grad_norm


def go_back(trainer: Trainer, step: int, saver: Saver, metrics: Recorder) -> None:
    """Take over the last checkpoint before the bad steps, and pass over all samples since it; UserError without one."""
    job, optimizer, watch = trainer.job, trainer.optimizer, trainer.watch
    saver.wait()
    what = f"step {step}: {watch.bad_steps} steps in a row had a loss or gradient that was no number, or a spike"
    first = watch.first_skipped
    directory = None if watch.went_back else state.newest(job, first - 1)
    if directory is None:
        why = "after going back as well" if watch.went_back else "and no checkpoint is from before them"
        raise UserError(
            f"{what}, {why}: look at the data of steps {first} to {step}; with these in skip_steps a rerun goes on from"
            " before them, with another lr it begins anew"
        )
    back = state.load(directory, optimizer, watch)
    check_lease(job)  # loading takes a while
    optimizer.skipped_steps += step - back
    watch.goes_back()
    saver.forget(back, step)
    metrics.pass_over(back)
    log.warning("%s: went back to step %s, whose samples up to step %s are passed over", what, back, step)


def is_due(every: int, step: int) -> bool:
    """Whether a step is an every-th one; 0: none is."""
    return every > 0 and step % every == 0


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


def global_loss(loss: torch.Tensor, groups: Groups, timeout: timedelta) -> float:
    """Σ w·ℓ / Σ w from each rank's share; the tp ranks of a stage all have the same share.

    Where another rank hangs, this is the wait that raises: NCCL's own end of patience ends the process without a word.
    """
    total = loss / groups.layout.tp
    work = dist.all_reduce(total, async_op=True)
    assert work is not None
    work.wait(timeout)
    return total.item()


def most_memory(groups: Groups) -> int:
    """The peak of the fullest rank, in bytes."""
    peak = torch.tensor(memory_bytes(groups.device), device=groups.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def orders(job: Job, minutes: float) -> tuple[bool, bool]:
    """(stop, save): asked to stop, `minutes` without a checkpoint enough?

    UserError on all ranks if another trainer has taken the run over.
    """
    stop, save, is_held = from_rank_0(
        lambda: asked_to_stop(job.run),
        lambda: 0 < job.recipe.save_minutes <= minutes,
        lambda: lease.held(job.run),
    )
    if not is_held:
        raise UserError(lease.lost(job.run))
    return stop, save


def has_to_stop(job: Job) -> bool:
    """Asked to stop? On all ranks alike."""
    return from_rank_0(lambda: asked_to_stop(job.run))[0]


def check_lease(job: Job) -> None:
    """UserError on all ranks if another trainer has taken the run over."""
    (is_held,) = from_rank_0(lambda: lease.held(job.run))
    if not is_held:
        raise UserError(lease.lost(job.run))


def from_rank_0(*looks: Callable[[], bool]) -> list[bool]:
    """What rank 0 finds, on all ranks, so that they act alike."""
    found = torch.zeros(len(looks), dtype=torch.bool)
    if dist.get_rank() == 0:
        found = torch.tensor([look() for look in looks])
    dist.broadcast(found, src=0)
    return found.tolist()


def asked_to_stop(run: Path) -> bool:
    """Is there a file RUN/stop?"""
    return (run / "stop").exists()

"""What a rank needs before the first step: its groups, its part of the model, its optimizer, its data."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import DTYPES
from llmpipe.checkpoint.formats import open_source
from llmpipe.data.batches.loader import Loader
from llmpipe.data.batches.packing import open_samples
from llmpipe.data.batches.sampling import Blend
from llmpipe.layout import Coordinates
from llmpipe.model.load import fill
from llmpipe.model.rank import RankModel
from llmpipe.model.recompute import Recompute
from llmpipe.parallel.data import distribute
from llmpipe.parallel.groups import Groups, make_groups, rank_device
from llmpipe.parallel.pipeline import Pipeline
from llmpipe.train.apex import use_fused_rms_norm
from llmpipe.train.batches import Batches
from llmpipe.train.evaluation import Evaluation
from llmpipe.train.faults import Watch
from llmpipe.train.job import Job
from llmpipe.train.observe import Observer
from llmpipe.train.optimizer import Optimizer
from llmpipe.train.tally import Tally


@dataclass(frozen=True, slots=True)
class Trainer:
    """What one rank trains with; made by `prepare`."""

    job: Job
    groups: Groups
    model: RankModel
    pipeline: Pipeline
    optimizer: Optimizer
    blend: Blend
    loader: Loader
    watch: Watch
    tally: Tally
    evaluation: Evaluation | None
    observer: Observer


def prepare(job: Job) -> Trainer:
    """Everything that a rank needs before the first step: groups, its part of the model, optimizer, data."""
    recipe, layout = job.recipe, job.layout
    groups = make_groups(layout, rank_device(layout.device))
    manifest.check(Path(job.model), dist.get_rank(), dist.get_world_size())  # the very bytes that the cards judged
    job.check_model()
    job.check_data()
    source = open_source(Path(job.model))
    shape = source.shape
    with torch.device("meta"):
        model = RankModel(
            shape, groups.tp, layout.stages, groups.at.pp,
            recompute=Recompute(recipe.recompute, recipe.recompute_every), cp=groups.cp, dropout=recipe.dropout,
        )  # fmt: skip
    model.to(DTYPES[recipe.parameters])
    if "rms_norm" in recipe.apex:
        use_fused_rms_norm(model)
    for stage in model:
        if recipe.compile:
            stage.compile_layers()
        distribute(stage, groups, DTYPES[recipe.precision], DTYPES[recipe.gradients])
    optimizer = Optimizer(model, shape, recipe, groups)
    fill(optimizer.parameters, source, groups.tp, layout.shards, groups.shard_rank)
    optimizer.into_model()
    blend = open_blend(job)
    loader = open_loader(job, groups.at, blend)
    num_tokens = layout.micro_batch * recipe.seq_len // layout.cp
    pipeline = Pipeline(model, groups, num_tokens, shape.hidden, DTYPES[recipe.precision])
    return Trainer(job, groups, model, pipeline, optimizer, blend, loader, Watch(recipe), *_seeing(job, groups))


def open_blend(job: Job) -> Blend:
    """The training data: as many samples as all steps take."""
    recipe = job.recipe
    return Blend(
        {Path(prefix): weight for prefix, weight in job.data.items()},
        job.split,
        "train",
        recipe.seq_len,
        Batches(recipe).total,
        recipe.seed,
        partial(open_samples, scalar_loss_mask=recipe.scalar_loss_mask, packing=recipe.packing),
    )


def open_loader(job: Job, at: Coordinates, blend: Blend) -> Loader:
    """A rank's batches of training data."""
    recipe, layout = job.recipe, job.layout
    return Loader(
        blend,
        seq_len=recipe.seq_len,
        global_batch=recipe.global_batch,
        micro_batch=layout.micro_batch,
        dp=layout.dp,
        dp_rank=at.dp,
        cp=layout.cp,
        cp_rank=at.cp,
        samples_of=Batches(recipe).of_step,
        isolate_documents=recipe.isolate_documents,
        # Stages hand on tensors of one size, and layers are compiled for one; cp and tp ranks share a micro-batch's
        # tokens out evenly.
        pad_to=math.lcm(16, layout.token_parts) if layout.pp == 1 and not recipe.compile else None,
    )


def _seeing(job: Job, groups: Groups) -> tuple[Tally, Evaluation | None, Observer]:
    """What looks on, and changes nothing."""
    evaluation = Evaluation(job, groups, DTYPES[job.recipe.precision]) if job.recipe.eval_every else None
    return Tally(groups), evaluation, Observer(job, groups.device)

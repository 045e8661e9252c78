"""What is checked before any process is started: a training that cannot work is refused at once, saying what would."""

import logging
import math
from pathlib import Path

import torch

from llmpipe.checkpoint import manifest as checkpoint_manifest
from llmpipe.checkpoint.formats import open_source
from llmpipe.data.batches.fit import check_tokenizer, check_vocab
from llmpipe.data.batches.loader import check_batch
from llmpipe.data.batches.packing import check_part
from llmpipe.data.batches.sampling import part_of
from llmpipe.data.dataset import manifest
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.tokenizer import find_tokenizer
from llmpipe.errors import UserError
from llmpipe.layout import Layout
from llmpipe.model.rope import longest_text
from llmpipe.parallel import gpus
from llmpipe.parallel.schedules import check_micro_batches
from llmpipe.recipe import Recipe
from llmpipe.train.apex import check_apex
from llmpipe.train.batches import Batches
from llmpipe.train.job import Job
from llmpipe.train.saved import saved, step_of
from llmpipe.train.schedule import warmup_samples

log = logging.getLogger(__name__)


def check_tokens(layout: Layout, seq_len: int) -> None:
    """UserError, naming what would work, if a micro-batch's tokens cannot be shared out over cp and tp ranks."""
    parts, num_tokens = layout.token_parts, layout.micro_batch * seq_len
    if num_tokens % parts:
        step = parts // math.gcd(parts, layout.micro_batch)
        below, above = seq_len // step * step, -(-seq_len // step) * step
        raise UserError(
            f"micro_batch {layout.micro_batch} x seq_len {seq_len} = {num_tokens} tokens are not divisible by {parts},"
            f" as cp {layout.cp} and tp {layout.tp} need it: seq_len {f'{below} or ' if below else ''}{above} would"
            " work, or another micro_batch, cp or tp"
        )


def check_size(size: int, recipe: Recipe, layout: Layout) -> None:
    """UserError if a step of so many sequences does not deal out to ranks and pipeline stages."""
    key = "global_batch" if size == recipe.global_batch else "batch_ramp"
    check_batch(size, layout.micro_batch, layout.dp, key)
    check_micro_batches(layout, size, key)


def check_sizes(job: Job) -> None:
    """UserError if a step that is still to come does not deal out."""
    done = steps_done(job) if job.recipe.batch_ramp else 0
    for size in Batches(job.recipe).sizes_from(done):
        check_size(size, job.recipe, job.layout)


def steps_done(job: Job) -> int:
    """Those of the newest checkpoint, which a rerun goes on from; 0 without one."""
    if not (job.run / "checkpoints").is_dir():  # the folder's name there may take hashing the data
        return 0
    found = saved(job.checkpoints, job.recipe.steps)
    return next((step_of(path) for path in found if (path / checkpoint_manifest.NAME).is_file()), 0)


def check_steps(job: Job) -> None:
    """UserError for steps to trace that there are not; a warning for a warmup that never ends."""
    recipe, batches = job.recipe, Batches(job.recipe)
    if job.profile_steps and job.profile_steps[0] > recipe.steps:
        raise UserError(f"--profile-steps {job.profile_steps[0]}: there are only {recipe.steps} steps to trace")
    if warmup_samples(recipe, batches) > batches.total:
        log.warning(
            "the schedule's warmup goes on beyond the last of %s steps: the rate never comes to lr %s",
            recipe.steps,
            recipe.lr,
        )


def check_halves(job: Job) -> None:
    """UserError for what a zero-bubble schedule, which runs a backward pass in two halves, would do twice or cannot."""
    if job.layout.pp > 1 and job.layout.pp_schedule == "zero-bubble":
        if torch.__version__ < "2.13":  # halves end at functions whose gradients are not torch's own
            raise UserError(
                f"layout: pp_schedule zero-bubble needs torch 2.13, and this is {torch.__version__}: another"
                " pp_schedule would work"
            )
        compiled = "true" if job.recipe.compile else "false"
        for key, value, works in (("recompute", job.recipe.recompute, "off"), ("compile", compiled, "false")):
            if value != works:
                raise UserError(
                    f"layout: pp_schedule zero-bubble computes weights' gradients apart from the others, and"
                    f" {key} is {value}: {key}: {works} in the recipe would work, or another pp_schedule"
                )


def check_data(job: Job, vocab: int) -> None:
    """UserError for datasets that are damaged, have nothing to train or evaluate on, or do not fit the model."""
    tokenizer = find_tokenizer(Path(job.model))
    for prefix in job.data:
        check_part(Path(prefix), job.split, "train", job.recipe.seq_len)
    if job.recipe.eval_every:
        data, split = job.held_out
        for prefix in data:
            check_part(prefix, split, "validation", job.recipe.seq_len)
    for prefix in job.data | job.validation | job.test:
        manifest.check(Path(prefix))
        if tokenizer:
            check_tokenizer(Path(prefix), tokenizer)
        check_vocab(Path(prefix), vocab)


def check_test(job: Job) -> None:
    """A warning if a dataset has nothing to measure the trained model's perplexity on: evaluate refuses that later."""
    data, split = (job.test, [0.0, 0.0, 1.0]) if job.test else (job.data, job.split)
    for prefix in data if split[2] else []:
        try:
            part_of(Reader(Path(prefix)), split, "test")
        except UserError as error:
            log.warning("%s, or evaluate cannot measure perplexity on it after the training", error)


def check_compile(job: Job) -> None:
    """UserError for compiled layers over tp ranks on a torch whose compiled collectives give other gradients."""
    if job.recipe.compile and job.layout.tp > 1 and torch.__version__ < "2.13":
        raise UserError(
            f"compile: true with tp {job.layout.tp} trains wrongly on torch {torch.__version__}: compile: false in the"
            " recipe would work, or tp 1, or torch 2.13"
        )


def check_machine(job: Job, dry_run: bool) -> None:
    """UserError for a job that this machine, or this torch, cannot train.

    A dry run is for looking at what another machine will train: GPUs that are not here are a warning.
    """
    try:
        gpus.check_device(job.layout)
    except UserError as error:
        if not dry_run:
            raise
        log.warning("this machine could not train it: %s", error)
    check_halves(job)
    check_compile(job)
    check_apex(job.recipe.apex, job.layout.device)


def preflight(job: Job, dry_run: bool = False, elsewhere: bool = False) -> None:
    """UserError for a job that cannot work; logs the batch's arithmetic as one sentence.

    `elsewhere`: the ranks will have another torch, in a container, where this is called again.
    """
    recipe, layout = job.recipe, job.layout
    if not elsewhere:
        check_machine(job, dry_run)
    layout.check_training()
    check_steps(job)
    shape = open_source(Path(job.model)).shape
    shape.check_split(layout.tp, layout.stages)
    check_sizes(job)
    check_tokens(layout, recipe.seq_len)
    if recipe.seq_len > longest_text(shape):
        raise UserError(f"seq_len {recipe.seq_len} is longer than the model's {longest_text(shape)} positions")
    check_data(job, shape.vocab)
    check_test(job)
    batches = Batches(recipe)
    log.info(
        "%s steps of %s sequences x %s tokens = %s tokens;"
        " %s processes = tp %s x pp %s x cp %s x dp %s, each with %s micro-batches of %s",
        recipe.steps, " to ".join(str(size) for size in sorted({batches.sizes[0], batches.sizes[-1]})), recipe.seq_len,
        batches.total * recipe.seq_len,
        layout.processes, layout.tp, layout.pp, layout.cp, layout.dp,
        batches.sizes[-1] // (layout.micro_batch * layout.dp), layout.micro_batch,
    )  # fmt: skip

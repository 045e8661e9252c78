"""config/recipes/NAME.yaml: how to train, as frozen dataclasses, which are its schema; no paths, no layout."""

import math
from dataclasses import dataclass, field
from typing import Literal

from llmpipe.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate over the steps, or, where their batches grow, over the samples."""

    kind: Literal["cosine", "linear", "inverse-sqrt", "wsd", "constant"] = "cosine"
    """Its course after warmup: down to min_lr along half a cosine or a line; as 1 / sqrt(samples) from warmup's end on,
    min_lr at least; constant, and at the end down to min_lr (wsd: warmup, stable, decay); constant."""
    warmup: float = 0.0
    """Steps of linear warmup; below 1, a fraction of all steps."""
    warmup_samples: int = 0
    """Sequences of linear warmup, in place of warmup."""
    min_lr: float = 0.0
    """What the rate goes down to."""
    decay: float = 0.1
    """Of wsd: the steps of its decay; below 1, a fraction of all steps."""
    decay_shape: Literal["linear", "cosine", "exponential", "1-sqrt"] = "1-sqrt"
    """Of wsd: the course of its decay. exponential is Megatron's, 2 · 0.5^share - 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < math.inf or self.warmup_samples < 0:
            wrong = "warmup" if self.warmup_samples >= 0 else "warmup_samples"
            raise UserError(f"schedule.{wrong} is {getattr(self, wrong)}, but has to be 0 or more")
        if self.warmup and self.warmup_samples:
            raise UserError("schedule has warmup and warmup_samples: leave one out")
        if self.kind == "inverse-sqrt" and not (self.warmup or self.warmup_samples):
            raise UserError("schedule.kind inverse-sqrt falls from warmup's end on, as 1 / sqrt: give a warmup")
        if not 0 < self.decay < math.inf:
            raise UserError(f"schedule.decay is {self.decay}, but has to be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDecayRamp:
    """How weight_decay changes over the steps."""

    end: float
    """What it has come to at the end."""
    kind: Literal["linear", "cosine"] = "linear"
    """Its course: along a line or half a cosine."""

    def __post_init__(self) -> None:
        if not 0 <= self.end < math.inf:
            raise UserError(f"weight_decay_ramp.end is {self.end}, but has to be 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRamp:
    """Smaller batches at the start: Megatron's --rampup-batch-size."""

    start: int
    """Sequences in the first step."""
    increment: int
    """By how many sequences steps grow, again and again, up to global_batch."""
    samples: int
    """The sequences over which they do, each size an even share of them."""

    def __post_init__(self) -> None:
        for name in ("start", "increment", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"batch_ramp.{name} is {getattr(self, name)}, but has to be 1 or more")

    def check(self, global_batch: int) -> None:
        """UserError if steps do not come to the global batch."""
        if self.start > global_batch or (global_batch - self.start) % self.increment:
            raise UserError(
                f"batch_ramp goes from {self.start} up by {self.increment} and never comes to global_batch"
                f" {global_batch}: {global_batch} - start has to be a multiple of increment"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """Shares of values that are zeroed in training, at random."""

    hidden: float = 0.0
    """Of the embedding, and of what attention and MLP add to the residual stream."""
    attention: float = 0.0
    """Of attention's probabilities; a GPU then attends to packed documents one by one, which is slower."""
    lima: bool = False
    """`hidden` rises linearly from 0 in the first layer, and at the embedding, to its full value in the last one.
    Zhou et al. 2023, LIMA."""

    def __post_init__(self) -> None:
        for name in ("hidden", "attention"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"dropout.{name} is {getattr(self, name)}, but has to be from 0 to below 1")
        if self.lima and not self.hidden:
            raise UserError("dropout.lima raises dropout.hidden over the layers, but that is 0")

    @property
    def embedding(self) -> float:
        """The share at the embedding."""
        return 0.0 if self.lima else self.hidden

    def hidden_of(self, layer: int, num_layers: int) -> float:
        """The share in a layer."""
        return self.hidden * layer / max(1, num_layers - 1) if self.lima else self.hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """What the loss is multiplied by in fp16, so that small gradients are numbers there too: Megatron's rule."""

    initial: float = 2.0**32
    min: float = 1.0
    """It is never made smaller than this."""
    window: int = 1000
    """Steps without overflow after which it grows."""
    hysteresis: int = 2
    """Steps with overflow since it grew last, from which on each one makes it smaller."""
    growth: float = 2.0
    backoff: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.min <= self.initial < math.inf:
            raise UserError(
                f"loss_scale: min is {self.min} and initial {self.initial}, but 0 < min <= initial has to hold"
            )
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise UserError(f"loss_scale.{name} is {getattr(self, name)}, but has to be 1 or more")
        if not (1 < self.growth < math.inf and 0 < self.backoff < 1):
            raise UserError(
                f"loss_scale: growth is {self.growth} and backoff {self.backoff}, but growth has to be above 1,"
                " backoff between 0 and 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """When a step is skipped because its loss or gradient leaps: judged once `window` steps were taken."""

    factor: float = 0.0
    """A loss above this many times the median of the last ones is a spike; 0: none is."""
    norm_factor: float = 0.0
    """The same of the gradient's norm before clipping."""
    window: int = 50
    """Steps, taken and not skipped, whose median it is."""

    def __post_init__(self) -> None:
        for name in ("factor", "norm_factor"):
            if getattr(self, name) and not 1 < getattr(self, name) < math.inf:
                raise UserError(f"spike.{name} is {getattr(self, name)}, but has to be above 1, or 0")
        if self.window < 1:
            raise UserError(f"spike.window is {self.window}, but has to be 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train."""

    seq_len: int
    """Tokens in a sequence."""
    global_batch: int
    """Sequences in a step."""
    batch_ramp: BatchRamp | None = None
    """Left out, all steps take global_batch."""
    steps: int
    """Optimizer steps."""
    lr: float
    """The peak learning rate."""
    schedule: Schedule = field(default_factory=Schedule)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """What forward and backward compute in."""
    parameters: Literal["bf16", "fp32"] = "fp32"
    """What the optimizer keeps weights and its state in. fp32: master weights, of which the model computes with a
    rounded copy. bf16: half the memory, but changes below a weight's last digit are lost to rounding."""
    gradients: Literal["bf16", "fp32"] = "fp32"
    """What gradients are summed up in over micro-batches and ranks."""
    loss_scale: LossScale = field(default_factory=LossScale)
    """Of fp16 alone."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, of matrices alone: norms and biases have none."""
    weight_decay_ramp: WeightDecayRamp | None = None
    """Left out, weight_decay stays as it is."""
    decay_embedding: bool = True
    """false: the embedding, which may be the head too, has no decay either."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip: float = 1.0
    """The gradient's global norm is cut down to this."""
    apex: list[Literal["adamw", "rms_norm"]] = field(default_factory=list)
    """What NVIDIA apex's fused kernels do; torch's do the rest."""
    seed: int = 1234
    """Decides the order of the data."""
    isolate_documents: bool = True
    """Packed documents do not see each other; false crosses them as Megatron does."""
    packing: bool = True
    """Of chats: as many whole ones as fit go into a sequence, which costs no attention between them. false: one in
    each sequence, and a micro-batch is as long as its longest."""
    scalar_loss_mask: float = 0.0
    """Of chats: how much tokens that are not the assistant's count in the loss; the assistant's count 1."""
    dropout: Dropout = field(default_factory=Dropout)
    recompute: Literal["off", "selective", "full"] = "off"
    """full: layers' activations are computed again in the backward pass; selective: only those between their products
    with weights, attention and the MLP's activation."""
    recompute_every: int = 1
    """Only every so-manyth layer's."""
    compile: bool = False
    """Each layer is compiled by torch.compile."""
    deterministic: bool = False
    """Kernels that give the same bits each time; one that cannot ends the run, and is named."""
    save_every: int = 100
    """Steps between checkpoints."""
    save_minutes: float = 0.0
    """Minutes after which there is one in any case; 0: none for the time's sake."""
    keep: int = 2
    """Checkpoints that are kept, the newest: a second one should the first turn out damaged."""
    milestones: int = 0
    """Every so-manyth step has a checkpoint that is kept for ever; 0: none has."""
    skip_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose samples are passed over."""
    spike: Spike = field(default_factory=Spike)
    """Steps that are skipped, as those are whose loss or gradient is no number."""
    roll_back_after: int = 5
    """So many of them in a row, and training goes back to the last checkpoint before them, and passes over the samples
    since then."""
    eval_every: int = 0
    """Steps between evaluations on held-out documents: the run's validation datasets, else the split's second share; 0:
    there is none."""
    eval_batches: int = 0
    """Of how many global batches an evaluation takes the documents, at most; 0: all that are held out."""
    check_replicas_every: int = 0
    """Steps after which ranks that hold the same weights compare them; 0: they never do."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "global_batch", "steps", "save_every", "recompute_every", "keep", "roll_back_after"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be 1 or more")
        for name in ("save_minutes", "milestones", "check_replicas_every", "eval_every", "eval_batches"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}, but has to be from 0 to {2**32 - 1}, as NumPy's generator takes it")
        if any(step < 1 for step in self.skip_steps):
            raise UserError(f"skip_steps is {self.skip_steps}, but steps count from 1")
        for name in ("lr", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but has to be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"weight_decay is {self.weight_decay}, but has to be 0 or more")
        if not 0 <= self.scalar_loss_mask < math.inf:
            raise UserError(f"scalar_loss_mask is {self.scalar_loss_mask}, but has to be 0 or more")
        if not 0 <= self.schedule.min_lr <= self.lr:
            raise UserError(f"schedule.min_lr is {self.schedule.min_lr}, but has to be from 0 to lr, {self.lr}")
        if self.schedule.decay > self.steps:
            raise UserError(f"schedule.decay is {self.schedule.decay}, but there are only {self.steps} steps")
        if self.batch_ramp:
            self.batch_ramp.check(self.global_batch)
        if "adamw" in self.apex and self.parameters == "bf16":
            raise UserError("apex: adamw keeps fp32 state, parameters: bf16 keeps bf16: leave one of them out")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas is {self.betas}, but has to be two numbers from 0 to below 1, as [0.9, 0.95]")

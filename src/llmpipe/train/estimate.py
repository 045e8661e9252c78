"""What a rank's memory goes to, in closed forms: an estimate, before anything is started.

Not in it: what CUDA and NCCL themselves take (1 to 2 GB a GPU), fragmentation, buffers of collectives.
N tokens of a micro-batch on a rank, H hidden, D head_dim.
"""

import math
from dataclasses import dataclass

from llmpipe.checkpoint.convert import DTYPES
from llmpipe.families import FAMILIES, Shape, layer_of
from llmpipe.layout import Layout
from llmpipe.model.loss import CHUNK_TOKENS
from llmpipe.parallel.data import sums_parts
from llmpipe.parallel.schedules import MANY_STAGES_EACH, schedule_name
from llmpipe.recipe import Recipe

BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at the fullest moment of a step."""

    parameters: float
    """The rank's part as the optimizer keeps it, and where nothing is shared out the copy that is computed with."""
    gathered: float
    """Whole weights during a step."""
    gradients: float
    optimizer: float
    activations: float
    """What the backward pass needs of micro-batches that are under way, and the loss's own chunk."""

    @property
    def total(self) -> float:
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations


def estimate(shape: Shape, recipe: Recipe, layout: Layout, pp_rank: int, num_micro_batches: int) -> Memory:
    """The memory of a rank of this pipeline rank; the layout is resolved."""
    sizes = rank_parameters(shape, layout, pp_rank)
    whole, own = sum(sizes.values()), sum(sizes.values()) / layout.shards
    kept, compute = BYTES[recipe.parameters], BYTES[recipe.precision]
    copied = layout.shards == 1 and recipe.precision != recipe.parameters
    # The optimizer wants them as it keeps weights, and turns one after the other into that.
    of_step = own * kept
    of_passes = whole * BYTES[recipe.gradients] if _sums_whole(recipe, layout, num_micro_batches) else 0
    return Memory(
        parameters=own * (kept + copied * compute),
        gathered=_gathered(sizes, layout) * compute,
        gradients=max(of_passes, of_step),
        optimizer=own * 2 * kept,
        activations=_activations(shape, recipe, layout, pp_rank, num_micro_batches),
    )


def _sums_whole(recipe: Recipe, layout: Layout, num_micro_batches: int) -> bool:
    """Whether a rank adds up whole gradients, not parts of them."""
    if layout.shards == 1:
        return True
    return num_micro_batches > 1 and not sums_parts(layout, DTYPES[recipe.parameters], DTYPES[recipe.gradients])


def rank_parameters(shape: Shape, layout: Layout, pp_rank: int) -> dict[str, int]:
    """The elements of each tensor of a pipeline rank, the first tp rank's slice of it."""
    return {
        key: math.prod(part.stop - part.start for part in row.slices(shape, layout.tp, 0))
        for key, row in FAMILIES[shape.family].keys(shape, layout.stages, pp_rank).items()
    }


def _gathered(sizes: dict[str, int], layout: Layout) -> int:
    """Elements of whole weights beside a rank's part: two layers at a time, or all where they stay for a step."""
    if layout.shards == 1:
        return 0
    if not layout.gathers_again:
        return sum(sizes.values())
    layers: dict[int | None, int] = {}
    for key, size in sizes.items():
        layers[layer_of(key)] = layers.get(layer_of(key), 0) + size
    outside = layers.pop(None, 0)
    return outside + 2 * max(layers.values())


def layer_activations(shape: Shape, num_tokens: int, tp: int, device: str) -> int:
    """Elements that one layer keeps for its backward pass, each in the type that is computed in.

    What goes into the norms and comes out of them; queries, keys, values, and attention's output; of the MLP gate, up,
    the activation and the product with it, or without a gate what the activation takes and gives. The CPU's RMS norm
    keeps what it has divided, too, and documents' outputs of attention stand there alone and end to end.
    """
    family, heads, kv_heads = FAMILIES[shape.family], shape.num_heads // tp, max(1, shape.num_kv_heads // tp)
    num_norms = 1 if family.parallel and not shape.mlp_norm else 2
    streams = num_norms + (1 if family.parallel else 2)  # side by side, both norms take the same
    attention = 2 * heads + 2 * kv_heads
    if shape.qk_norm:  # queries and keys before their norms
        attention += heads + kv_heads
    if device == "cpu":
        attention += heads
        if family.norm == "rms":
            streams += num_norms
            attention += (heads + kv_heads) * shape.qk_norm
    mlp = (4 if family.mlp == "swiglu" else 2) * shape.ffn // tp
    return num_tokens * (streams * shape.hidden // tp + attention * shape.head_dim + mlp)


def _activations(shape: Shape, recipe: Recipe, layout: Layout, pp_rank: int, num_micro_batches: int) -> float:
    num_tokens = layout.micro_batch * recipe.seq_len // layout.cp
    full = layer_activations(shape, num_tokens, layout.tp, layout.device)
    small = num_tokens * shape.hidden // layout.tp
    kv_heads = max(1, shape.num_kv_heads // layout.tp)
    if recipe.recompute == "selective":  # attention's own tensors and the MLP's activation are computed again
        gates = 2 if FAMILIES[shape.family].mlp == "swiglu" else 1
        heads = shape.num_heads // layout.tp + 2 * kv_heads
        small = num_tokens * (4 * shape.hidden // layout.tp + heads * shape.head_dim + gates * shape.ffn // layout.tp)
    layers = layout.stages.layers_of(shape.num_layers, pp_rank)
    cheap = [layer for layer in layers if recipe.recompute != "off" and layer % recipe.recompute_every == 0]
    kept = len(cheap) * small + (len(layers) - len(cheap)) * full
    again = full if cheap else 0
    in_flight = micro_batches_in_flight(layout, pp_rank, num_micro_batches)
    passes = BYTES[recipe.precision] * (kept * in_flight + again)
    return passes + _loss(shape, recipe, layout, pp_rank, num_tokens, num_micro_batches)


def micro_batches_in_flight(layout: Layout, pp_rank: int, num_micro_batches: int) -> float:
    """Of how many micro-batches a pipeline rank holds the activations at once; of a virtual stage, its share of one."""
    if layout.pp == 1:
        return 1
    if layout.pp_schedule == "gpipe":
        return num_micro_batches
    if schedule_name(layout) in MANY_STAGES_EACH and layout.vp > 1:
        warmup = 2 * (layout.pp - pp_rank - 1) + (layout.vp - 1) * layout.pp + 1  # Narayanan et al. 2021
        return min(warmup, num_micro_batches * layout.vp) / layout.vp
    return min(layout.pp - pp_rank, num_micro_batches)


def _loss(shape: Shape, recipe: Recipe, layout: Layout, pp_rank: int, num_tokens: int, num_micro_batches: int) -> float:
    """On the last pipeline rank the head's gradient in fp32, and a chunk's logits in fp32 with their gradient.

    The loss has the head's gradient from its forward pass on: of each other micro-batch that is under way, too.
    """
    if pp_rank != layout.pp - 1:
        return 0
    rows, compute = -(-shape.vocab // layout.tp), BYTES[recipe.precision]
    others = num_micro_batches - 1 if layout.pp > 1 and layout.pp_schedule == "gpipe" else 0
    heads = rows * shape.hidden * (4 + others * compute)
    return heads + min(CHUNK_TOKENS, num_tokens) * rows * (4 + compute)

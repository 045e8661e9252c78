"""The orders of a pipeline's forward and backward passes that torch has, and the numbers of micro-batches they take.

GPipe: Huang et al. 2019, arXiv:1811.06965. 1F1B, and interleaved: Narayanan et al. 2021, arXiv:2104.04473. Zero-bubble:
Qi et al. 2023, arXiv:2401.10241, its ZB-H1, over virtual stages too.
"""

from llmpipe.errors import UserError
from llmpipe.layout import Layout

ONE_STAGE_EACH = ("1f1b", "gpipe")
"""Schedules of ranks with one stage."""
MANY_STAGES_EACH = ("interleaved", "zero-bubble")
"""Schedules of ranks with any number of stages."""


def schedule_name(layout: Layout) -> str:
    """The schedule of a layout: 1F1B over virtual stages is called interleaved."""
    return "interleaved" if layout.pp_schedule == "1f1b" and layout.vp > 1 else layout.pp_schedule


def takes(layout: Layout, num_micro_batches: int) -> bool:
    """Whether a pipeline can take so many micro-batches in a step: none of its stages may be left without any.

    Those over many stages go through the micro-batches in rounds of pp or more, each as long as the others.
    """
    rounds = num_micro_batches // layout.pp
    return rounds > 0 and (schedule_name(layout) in ONE_STAGE_EACH or num_micro_batches % rounds == 0)


def check_micro_batches(layout: Layout, global_batch: int, key: str = "global_batch") -> int:
    """The micro-batches of a pipeline in a step; UserError, naming what would work, for a number it cannot take.

    The layout is resolved, and global_batch, which `key` says, a multiple of dp * micro_batch.
    """
    each = layout.dp * layout.micro_batch
    count = global_batch // each
    if layout.pp == 1 or takes(layout, count):
        return count
    wrong = (
        f"fewer than its {layout.pp} stages"
        if count < layout.pp
        else f"which pp_schedule {schedule_name(layout)} cannot share out evenly over {count // layout.pp} rounds"
    )
    below = next((n for n in range(count, 0, -1) if takes(layout, n)), None)
    above = next(n for n in range(count, 2 * (count + layout.pp)) if takes(layout, n))
    would = " or ".join(str(n * each) for n in (below, above) if n)
    raise UserError(
        f"a global batch of {global_batch} gives each pipeline {count} micro-batches of {layout.micro_batch}, {wrong}:"
        f" {key} {would} would work, or another micro_batch, dp or pp"
    )

"""The way back: the checkpoint, laid out again as its source's files would hold it, is the source's bytes.

Each of the source's tensors is compared, file by file, with what convert's writer of that format makes of the
checkpoint, a window at a time and without writing anything; where convert cast, with the cast of the source's values.
It finds what the fingerprints leave to the forward: rows in another order, tensors of one layer in each other's place.
"""

from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmpipe.checkpoint.formats import Told, detect, open_source
from llmpipe.checkpoint.hf import stored_dtype
from llmpipe.checkpoint.layouts import Stored
from llmpipe.checkpoint.mover import Filled, Mover
from llmpipe.checkpoint.source import TensorSource
from llmpipe.errors import UserError
from llmpipe.families import Shape
from llmpipe.files import CHUNK_BYTES
from llmpipe.progress import progress
from llmpipe.verify.card import Check, Findings, at_most
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.stored_bytes import Reference, StoredBytes, stored_tensors

NAME = "round trip"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def round_trip_checks(subject: Path, source: Reference, made_from: dict[str, Any]) -> Findings:
    """The row of the card on the way back, and the first tensor that is not the source's.

    `made_from`: the manifest's source; of a merged adapter there is no way back, which the row says.
    """
    if "adapter" in made_from:
        detail = "not applicable: an adapter was merged, from which nothing leads back to the source's bytes"
        return [Check(NAME, None, None, "not run", detail)], None
    try:
        checkpoint, rows = _opened(subject, source, made_from)
        wrong, count = _compare(checkpoint, source, replace(checkpoint.shape, vocab=rows))
    except (UserError, RuntimeError) as error:  # torch's: a tensor does not fit the settings
        return [at_most(NAME, None, 0, str(error))], str(error)
    detail = f"{count} tensors as {source.kind}'s files hold them are the source's, bit for bit as stored"
    if wrong:
        detail = f"of {count} tensors of {source.kind}'s files these do not come back: {', '.join(wrong[:4])}"
    return [at_most(NAME, len(wrong), 0, detail)], next(iter(wrong), None)


def _opened(subject: Path, source: Reference, made_from: dict[str, Any]) -> tuple[TensorSource, int]:
    """The subject's tensors, and how many rows of its vocabulary are the source's."""
    if detect(subject) == "hf":
        checkpoint = open_source(subject)
    else:  # whose files may not say all of the shape
        checkpoint = open_source(subject, Told(open_source(source.path, _told(made_from)).shape))
    vocab, added = checkpoint.shape.vocab, len(made_from.get("added_tokens", ()))
    rows = source.vocab if isinstance(source, MegatronModel) else int(source.hyper_parameters()["vocabulary"])
    if vocab != rows and not (added and vocab > rows):
        raise UserError(f"{subject} has {vocab} rows of the vocabulary, the source {rows}")
    return checkpoint, rows


def _told(made_from: dict[str, Any]) -> Told:
    """What the user said of the source, as the manifest has it."""
    told = made_from.get("told", {})
    shape = Shape(**told["shape"]) if "shape" in told else None
    return Told(shape, told.get("dialect"), told.get("vocab"))


def _compare(checkpoint: TensorSource, source: Reference, shape: Shape) -> tuple[list[str], int]:
    """The names of the source's tensors that do not come back, and of those of ours that never went; and how many."""
    mover, wrong, went = Mover(checkpoint, hashed=False, allow_nonfinite=True), [], set[str]()
    tensors = list(stored_tensors(source, shape))
    with progress("verify (round trip)", len(tensors), "tensors") as shown:
        for each in tensors:
            went |= {part.key for part in each.laid_out.parts} if each.laid_out else set()
            wrong += [] if _comes_back(mover, each) else [each.name]
            shown.add(1, each.name)
    return wrong + [key for key in checkpoint.keys() if key not in went], len(tensors)  # noqa: SIM118


def _comes_back(mover: Mover, each: StoredBytes) -> bool:
    """Whether a tensor of the source is what the writer makes of the checkpoint."""
    if each.laid_out is None or not each.laid_out.parts or each.laid_out.shape != each.shape:
        return False
    stored = _true_rows(each.laid_out)
    dtype, at = stored_dtype(mover.source, stored), 0
    buffers = repeat(np.empty(CHUNK_BYTES, np.uint8))
    for window in mover.windows(Filled(stored, dtype), buffers) if stored.shape[0] else ():
        ours = torch.from_numpy(window).view(dtype).view(-1, *stored.shape[1:])
        if not _same(ours, each.read(slice(at, at + len(ours))).to(dtype)):
            return False
        at += len(ours)
    return True


def _true_rows(stored: Stored) -> Stored:
    """A table of the vocabulary without its padding."""
    if stored.padding is None:
        return stored
    rows = sum(part.rows.stop - part.rows.start for part in stored.parts)
    return replace(stored, shape=(rows, *stored.shape[1:]), padding=None)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit; of what is no number only that it is none, whose other bits a cast may change."""
    kind = _BITS[one.element_size()]
    unequal = one.view(kind) != other.contiguous().view(kind)
    return not bool(unequal.any()) or bool((one.isnan() & other.isnan())[unequal].all())

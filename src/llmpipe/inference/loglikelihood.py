"""How likely a model finds tokens: continuations of a context, and sequences of any length.

T tokens of a window, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from llmpipe.progress import progress

BATCH_TOKENS = 4096  # at 32,000 tokens of vocabulary 0.5 GB of logits

Request = tuple[Sequence[int], Sequence[int]]


class HasLogits(Protocol):
    """What is asked of an engine."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) token ids → (B, T, V) fp32."""
        ...


@dataclass(slots=True)
class Score:
    """What a model makes of one continuation."""

    logprob: float = 0.0
    """Σ ln p of its tokens."""
    greedy: bool = True
    """Whether each token is the model's first choice."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a request that fits the model; its last `num_predicted` tokens are scored."""

    request: int
    tokens: Sequence[int]
    """The model reads all but the last one."""
    num_predicted: int


def loglikelihoods(
    engine: HasLogits, requests: Sequence[Request], window: int, stride: int | None = None, label: str = "loglikelihood"
) -> list[Score]:
    """The score of each continuation given its context, (context, continuation) in tokens; the context has one or more.

    What is longer than `window` is read in windows that move by `stride` (default `window`) tokens: each token is
    predicted once, with all the context that its window has room for. A context too long loses its start.
    """
    scores = [Score() for _ in requests]
    windows = [
        part
        for index, (context, continuation) in enumerate(requests)
        for part in split(index, context, continuation, window, stride or window)
    ]
    with progress(label, sum(len(part.tokens) for part in windows), "tokens") as shown:
        for batch in batches(windows, BATCH_TOKENS):
            score_batch(engine, batch, scores)
            shown.add(sum(len(part.tokens) for part in batch))
    return scores


def split(
    index: int, context: Sequence[int], continuation: Sequence[int], window: int, stride: int
) -> Iterator[Window]:
    """The windows that predict each token of the continuation once."""
    assert context, "the first token has to be predicted from something"
    tokens = [*context, *continuation]
    predicted = len(context)
    while predicted < len(tokens):
        first = predicted == len(context)
        end = min(len(tokens), max(window + 1, predicted + stride) if first else predicted + stride)
        yield Window(index, tokens[max(0, end - 1 - window) : end], end - predicted)
        predicted = end


def batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """The windows, longest first, in batches of at most `batch_tokens` with the padding that they need."""
    batch: list[Window] = []
    for part in sorted(windows, key=lambda part: -len(part.tokens)):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > batch_tokens:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def score_batch(engine: HasLogits, batch: list[Window], scores: list[Score]) -> None:
    """Add what the windows predict to their requests' scores."""
    logits = engine.logits(right_padded([part.tokens[:-1] for part in batch]))  # (B, T, V)
    for row, part in zip(logits, batch, strict=True):
        end, count = len(part.tokens) - 1, part.num_predicted
        predictions = row[end - count : end].log_softmax(-1)  # (count, V)
        targets = torch.tensor(part.tokens[-count:], device=row.device)  # (count,)
        score = scores[part.request]
        score.logprob += float(predictions.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        score.greedy &= bool((predictions.argmax(-1) == targets).all())


def right_padded(rows: list[Sequence[int]]) -> torch.Tensor:
    """(B, T) of the rows; what follows a row's end cannot change what a causal model says before it."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])

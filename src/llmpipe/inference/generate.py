"""Greedy generation: the whole sequence is computed again for each token.

B rows, T tokens of the longest one, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from llmpipe.inference.loglikelihood import HasLogits, right_padded

Stop = Callable[[list[int]], bool]


def greedy(
    engine: HasLogits, prompts: Sequence[Sequence[int]], max_new_tokens: int, window: int, stop: Stop | None = None
) -> list[list[int]]:
    """The tokens that follow each prompt; a row ends with the token after which `stop` says so of its new tokens.

    The model reads the last `window` tokens.
    """
    found: list[list[int]] = [[] for _ in prompts]
    active = [row for row, prompt in enumerate(prompts) if prompt]
    for _ in range(max_new_tokens):
        if not active:
            break
        rows = [[*prompts[row], *found[row]][-window:] for row in active]
        for row, token in zip(active, next_tokens(engine, rows), strict=True):
            found[row].append(token)
        active = [row for row in active if not (stop and stop(found[row]))]
    return found


def next_tokens(engine: HasLogits, rows: list[list[int]]) -> list[int]:
    """The first choice after each row."""
    logits = engine.logits(right_padded(list(rows)))  # (B, T, V)
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    return logits[torch.arange(len(rows), device=logits.device), last].argmax(-1).tolist()

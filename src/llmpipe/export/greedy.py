"""The same text from both: transformers' own generation on an export, and our sharded model in its own processes.

B rows of T tokens, V vocabulary. Both models are in memory as a whole, in fp32, one after the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.rank_files import RankFilesSource
from llmpipe.data.tokenizer import find_tokenizer, open_tokenizer
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.inference.forward import Engine
from llmpipe.inference.generate import greedy
from llmpipe.layout import Layout
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks
from llmpipe.verify.card import Check
from llmpipe.verify.compare import LOGIT_LIMIT
from llmpipe.verify.memory import available_bytes

NEW_TOKENS = 24
PROMPTS = ("Hello world", "def main():\n    return", "The following is", "1, 2, 3,")
_NAME = "prompts continued differently"


@dataclass(frozen=True, slots=True)
class Answers:
    """How a model goes on."""

    tokens: list[list[int]]
    """After each prompt."""
    logits: list[np.ndarray]
    """(NEW_TOKENS, V) of each: what each token was chosen from."""


def greedy_check(weights: Path, directory: Path) -> tuple[Check, list[str]]:
    """The row of the comparison and the texts; UserError at the first token that differs and was no tie.

    Not run where the machine has too little memory, or the weights have no tokenizer.
    """
    source = open_source(weights)
    needed = int(1.3 * 4 * FAMILIES[source.shape.family].num_parameters(source.shape))
    if needed > available_bytes():
        detail = f"{needed / 2**30:.3g} GiB are needed in fp32, more than were free; the logits above are of all layers"
        return Check(_NAME, None, None, "not run", detail), []
    if find_tokenizer(weights) is None:
        return Check(_NAME, None, None, "not run", "the weights have no tokenizer"), []
    tokenizer = open_tokenizer(weights)
    prompts = [[tokenizer.bos_id] * (tokenizer.bos_id >= 0) + tokenizer.encode(text) for text in PROMPTS]
    tp, pp = (source.tp, source.stages.pp) if isinstance(source, RankFilesSource) else (1, 1)
    ours = run_ranks(rank_answers, tp * pp, weights, prompts, tp, pp)[0]
    ties = check_greedy(ours, transformers_tokens(directory, prompts))
    detail = f"{len(prompts)} prompts, {NEW_TOKENS} tokens each, from {tp} x {pp} processes; {ties} ended by a tie"
    texts = [tokenizer.decode([*prompt, *new]) for prompt, new in zip(prompts, ours.tokens, strict=True)]
    return Check(_NAME, 0, 0, "pass", detail), texts


def rank_answers(weights: Path, prompts: list[list[int]], tp: int, pp: int) -> Answers | None:
    """Our sharded model's, in one of tp x pp processes."""
    groups = make_groups(Layout(tp=tp, pp=pp, gpus_per_node=tp * pp, device="cpu").resolved(), torch.device("cpu"))
    engine = Engine.open(weights, torch.float32, "cpu", groups)
    tokens = greedy(engine, prompts, NEW_TOKENS, engine.shape.max_positions)
    chosen_from = []
    for prompt, new in zip(prompts, tokens, strict=True):
        row = engine.logits(torch.tensor([[*prompt, *new]]))[0]  # (T, V)
        chosen_from.append(row[len(prompt) - 1 : -1].numpy())
    return Answers(tokens, chosen_from) if dist.get_rank() == 0 else None


@torch.no_grad()
def transformers_tokens(directory: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Those of transformers' own model and generation."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    return tokens


def check_greedy(ours: Answers, theirs: list[list[int]]) -> int:
    """UserError if a chosen token differs; returns in how many prompts two choices were as good as equal.

    After such a tie the two texts part, and no more of them is compared.
    """
    ties = 0
    for row, text in enumerate(PROMPTS):
        pairs = list(zip(ours.tokens[row], theirs[row], strict=True))
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if step is None:
            continue
        a, b = pairs[step]
        logits = ours.logits[row][step]
        gap = float(logits[a] - logits[b])
        if gap > LOGIT_LIMIT * float(np.abs(logits).max()):
            raise UserError(
                f"transformers on the export continues {text!r} with token {b} at step {step + 1}, the trained model"
                f" with {a}, {gap:.3g} above it; nothing was exported"
            )
        ties += 1
    return ties

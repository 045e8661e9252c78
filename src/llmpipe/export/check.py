"""The last check before a model is published: transformers on the export against our sharded model.

B rows of T tokens, V vocabulary.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.rank_files import RankFilesSource
from llmpipe.checkpoint.source import TensorSource
from llmpipe.data.tokenizer import Tokenizer, open_tokenizer
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES
from llmpipe.inference.forward import Engine
from llmpipe.inference.generate import greedy
from llmpipe.layout import Layout
from llmpipe.parallel.groups import make_groups
from llmpipe.parallel.processes import run_ranks
from llmpipe.verify.memory import available_bytes

log = logging.getLogger(__name__)

LIMIT = 1e-4  # of the largest logit
NEW_TOKENS = 24
PROMPTS = ("Hello world", "def main():\n    return", "The following is", "1, 2, 3,")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model says of the same questions."""

    logits: np.ndarray
    """(B, T, V) of the probe rows."""
    tokens: list[list[int]]
    """Greedy ones after each prompt."""
    greedy_logits: list[np.ndarray]
    """(NEW_TOKENS, V) of each: what each token was chosen from."""


def check_export(weights: Path, directory: Path) -> dict[str, Any]:
    """The numbers of the comparison; UserError at the first difference."""
    source = open_source(weights)
    num_tensors = check_tensors(source, open_source(directory))
    prompts = check_prompts(open_tokenizer(weights), directory)
    probe = probe_rows(source.shape.vocab)
    tp, pp = (source.tp, source.stages.pp) if isinstance(source, RankFilesSource) else (1, 1)
    ours = run_ranks(rank_answers, tp * pp, weights, probe, prompts, tp, pp)[0]  # first: fork before torch has threads
    theirs = transformers_answers(directory, probe, prompts)
    difference = check_logits(ours.logits, theirs.logits)
    ties = check_greedy(ours, theirs)
    tokenizer = open_tokenizer(weights)
    return {
        "tensors": {"bit_equal": num_tensors},
        "logits": difference,
        "greedy": {
            "prompts": list(PROMPTS),
            "new_tokens": NEW_TOKENS,
            "ties": ties,
            "texts": [tokenizer.decode([*p, *t]) for p, t in zip(prompts, ours.tokens, strict=True)],
        },
        "processes": {"tp": tp, "pp": pp},
    }


def check_memory(source: TensorSource) -> None:
    """UserError if the model does not fit this machine in fp32, before hours of work end in a killed process."""
    needed = int(1.3 * 4 * FAMILIES[source.shape.family].num_parameters(source.shape))
    if needed > (free := available_bytes()):
        raise UserError(
            f"the last check runs {source.path} in fp32 and needs {needed / 2**30:.3g} GiB of memory,"
            f" {free / 2**30:.3g} GiB are free: export on a larger machine, or give the job more (`export:` in"
            " slurm/config.yaml)"
        )


def check_tensors(source: TensorSource, exported: TensorSource) -> int:
    """Each tensor is the same bytes in the same type on both sides; returns how many there are."""
    keys = source.keys()
    for key in keys:
        ours, theirs = source.read(key), exported.read(key)
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if not same or not torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
            raise UserError(f"the round trip differs: {key} is not that of {source.path}; nothing was exported")
    return len(keys)


def check_prompts(tokenizer: Tokenizer, directory: Path) -> list[list[int]]:
    """The prompts' ids with BOS where the model has one; transformers' tokenizer has to give the same."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    prompts = []
    for text in PROMPTS:
        ids, found = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False)
        if ids != found:
            raise UserError(
                f"transformers' tokenizer of the export gives {found} for {text!r}, SentencePiece {ids}; nothing was"
                " exported"
            )
        prompts.append([tokenizer.bos_id, *ids] if tokenizer.bos_id >= 0 else ids)
    return prompts


def probe_rows(vocab: int, num_rows: int = 4, length: int = 64) -> torch.Tensor:
    """(B, T) random ids, the same each time."""
    return torch.randint(0, vocab, (num_rows, length), generator=torch.Generator().manual_seed(0))


def rank_answers(weights: Path, probe: torch.Tensor, prompts: list[list[int]], tp: int, pp: int) -> Answers | None:
    """Our sharded model's, in one of tp x pp processes."""
    groups = make_groups(Layout(tp=tp, pp=pp, gpus_per_node=tp * pp, device="cpu").resolved(), torch.device("cpu"))
    engine = Engine.open(weights, torch.float32, "cpu", groups)
    logits = engine.logits(probe).numpy()  # (B, T, V)
    tokens = greedy(engine, prompts, NEW_TOKENS, engine.shape.max_positions)
    chosen_from = []
    for prompt, new in zip(prompts, tokens, strict=True):
        row = engine.logits(torch.tensor([[*prompt, *new]]))[0]  # (T, V)
        chosen_from.append(row[len(prompt) - 1 : -1].numpy())
    return Answers(logits, tokens, chosen_from) if dist.get_rank() == 0 else None


@torch.no_grad()
def transformers_answers(directory: Path, probe: torch.Tensor, prompts: list[list[int]]) -> Answers:
    """Those of transformers' own model and generation."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    logits = model(probe).logits.numpy()  # (B, T, V)
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    return Answers(logits, tokens, [])


def check_logits(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """UserError if they are further apart than LIMIT of the largest."""
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(ours).max())
    if not difference <= LIMIT * largest:
        raise UserError(
            f"transformers' logits on the export differ from the trained model's by up to {difference:.3g}, more than"
            f" {LIMIT:g} of the largest logit, {largest:.3g}; nothing was exported"
        )
    log.info("largest difference of a logit %.3g, allowed %.3g", difference, LIMIT * largest)
    # A power of ten: transformers' last digits may hang on its threads, but a model always exports to the same bytes.
    at_most = 10.0 ** math.ceil(math.log10(difference)) if difference else 0.0
    return {"max_abs_difference_at_most": at_most, "max_abs_logit": largest, "limit": LIMIT * largest}


def check_greedy(ours: Answers, theirs: Answers) -> int:
    """UserError if a chosen token differs; returns in how many prompts two choices were as good as equal.

    After such a tie the two texts part, and no more of them is compared.
    """
    ties = 0
    for row, text in enumerate(PROMPTS):
        pairs = list(zip(ours.tokens[row], theirs.tokens[row], strict=True))
        step = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if step is None:
            continue
        a, b = pairs[step]
        logits = ours.greedy_logits[row][step]
        gap = float(logits[a] - logits[b])
        if gap > LIMIT * float(np.abs(logits).max()):
            raise UserError(
                f"transformers on the export continues {text!r} with token {b} at step {step + 1}, the trained model"
                f" with {a}, {gap:.3g} above it; nothing was exported"
            )
        ties += 1
    return ties

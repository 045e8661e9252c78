"""Log-likelihoods against a closed form and against transformers."""

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llmpipe.inference.forward import Engine
from llmpipe.inference.generate import greedy
from llmpipe.inference.loglikelihood import BATCH_TOKENS, batches, loglikelihoods, split

VOCAB = 7


class Successor:
    """Says that t + 1 follows t, with e^2 times the weight of each other token; records its calls."""

    def __init__(self) -> None:
        self.calls: list[torch.Size] = []

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.append(tokens.shape)
        return 2.0 * torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()


HIT = 2.0 - math.log(math.e**2 + VOCAB - 1)
MISS = -math.log(math.e**2 + VOCAB - 1)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 100])
def test_closed_form(window: int) -> None:
    requests = [([0], [1, 2, 3]), ([3, 3], [4, 4]), ([1], []), ([0, 1, 2, 3, 4], [5, 6, 0, 1, 2, 4])]
    scores = loglikelihoods(Successor(), requests, window)
    assert [score.logprob for score in scores] == pytest.approx([3 * HIT, HIT + MISS, 0.0, 5 * HIT + MISS])
    assert [score.greedy for score in scores] == [True, False, True, False]


@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize(
    ("num_context", "num_predicted"), [(1, 40), (1, 9), (5, 30), (30, 5), (30, 40), (1, 8), (4, 4)]
)
def test_each_token_is_predicted_once_from_all_that_fits(
    num_context: int, num_predicted: int, stride: int | None
) -> None:
    """Against the definition, token by token: windows never exceed the model, and give as much context as promised."""
    window, tokens = 8, list(range(num_context + num_predicted))
    parts = list(split(0, tokens[:num_context], tokens[num_context:], window, stride or window))
    predicted = [token for part in parts for token in part.tokens[-part.num_predicted :]]
    assert predicted == tokens[num_context:]
    for part in parts:
        assert len(part.tokens) - 1 <= window
        first = part.tokens[-part.num_predicted]
        seen = len(part.tokens) - part.num_predicted
        assert seen >= min(first, window - (stride or window) + 1)


def test_lm_eval_cuts_the_same_windows() -> None:
    from lm_eval.utils import get_rolling_token_windows

    tokens = list(range(100, 137))
    for window in (3, 8, 36, 37, 50):
        theirs = [
            ([*inputs, predicted[-1]], len(predicted))
            for inputs, predicted in get_rolling_token_windows(tokens, 99, window, 1)
        ]
        ours = [(list(part.tokens), part.num_predicted) for part in split(0, [99], tokens, window, window)]
        assert ours == theirs


def test_batches_keep_within_their_tokens_and_lose_nothing() -> None:
    random.seed(0)
    requests = [([0], [1] * random.randrange(1, 600)) for _ in range(60)]
    windows = [part for i, (a, b) in enumerate(requests) for part in split(i, a, b, 300, 300)]
    found = list(batches(windows, BATCH_TOKENS))
    assert sorted(map(id, windows)) == sorted(id(part) for batch in found for part in batch)
    assert all(len(batch) * max(len(part.tokens) for part in batch) <= BATCH_TOKENS for batch in found)


def test_loglikelihood_is_transformers_loss(checkpoint: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    torch.manual_seed(1)
    requests = [
        (torch.randint(384, (a,)).tolist(), torch.randint(384, (b,)).tolist()) for a, b in [(1, 30), (9, 3), (40, 1)]
    ]
    scores = loglikelihoods(Engine.open(checkpoint), requests, 64)
    for (context, continuation), score in zip(requests, scores, strict=True):
        tokens = torch.tensor([context + continuation])
        labels = tokens.clone()
        labels[:, : len(context)] = -100
        with torch.no_grad():
            loss = model(tokens, labels=labels).loss.item()
        assert score.logprob == pytest.approx(-loss * len(continuation), abs=1e-3)


def test_rolling_is_transformers_window_by_window(checkpoint: Path) -> None:
    """Longer than the window: each token from its own full window, one forward of transformers a token."""
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    tokens, window = torch.randint(384, (50,), generator=torch.Generator().manual_seed(2)).tolist(), 16
    expected = 0.0
    for position in range(1, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[max(0, position - window) : position]])).logits[0, -1]
        expected += logits.log_softmax(-1)[tokens[position]].item()
    (score,) = loglikelihoods(Engine.open(checkpoint), [(tokens[:1], tokens[1:])], window, stride=1)
    assert score.logprob == pytest.approx(expected, abs=1e-3)


def test_greedy_is_transformers(checkpoint: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    prompts = [[1, 5, 9], [1, 200, 17, 33, 4, 90], [1]]
    found = greedy(Engine.open(checkpoint), prompts, 12, 128)
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=[],
            pad_token_id=0,
        )
        assert tokens == expected[0, len(prompt) :].tolist()


def test_greedy_stops_each_row_by_itself_and_slides_its_window() -> None:
    model = Successor()
    found = greedy(model, [[0], [3, 4]], 5, 2, stop=lambda tokens: tokens[-1] == 6)
    assert found == [[1, 2, 3, 4, 5], [5, 6]]
    assert max(shape[1] for shape in model.calls) == 2

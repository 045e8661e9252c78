"""Perplexity against transformers' loss, the unigram baseline against its closed form."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llmpipe.errors import UserError
from llmpipe.evaluate.perplexity import count_tokens, model_perplexity, unigram_perplexity
from llmpipe.inference.forward import Engine


def test_perplexity_is_transformers_loss(checkpoint: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(384, (n,), generator=generator).tolist() for n in (2, 17, 40, 1)]
    nll = 0.0
    for document in documents[:3]:
        tokens = torch.tensor([document])
        with torch.no_grad():
            nll += model(tokens, labels=tokens).loss.item() * (len(document) - 1)
    found = model_perplexity(Engine.open(checkpoint), documents, 64)
    assert (found.tokens, found.documents) == (1 + 16 + 39, 3)
    assert found.value == pytest.approx(math.exp(nll / found.tokens), rel=1e-4)


def test_unigram_closed_form() -> None:
    """Training tokens 0 0 1 of a vocabulary of 4: p = 3/7, 2/7, 1/7, 1/7; first tokens are not predicted."""
    counts = count_tokens(np.array([0, 0, 1], np.uint16), 4)
    found = unigram_perplexity(counts, [[2, 0, 1], [0, 3], [1]])
    assert found.tokens == 3
    assert found.value == pytest.approx((3 / 7 * 2 / 7 * 1 / 7) ** (-1 / 3))


def test_counting_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpipe.evaluate.perplexity.CHUNK_TOKENS", 3)
    tokens = np.array([5, 1, 1, 0, 5, 5, 2, 1], np.uint16)
    assert count_tokens(tokens, 7).tolist() == [1, 3, 1, 0, 0, 3, 0]


def test_a_broken_model() -> None:
    class Broken:
        def logits(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full((*tokens.shape, 4), math.nan)

    with pytest.raises(
        UserError, match="gives held-out text a log-likelihood of nan: its weights hold NaN or infinity"
    ):
        model_perplexity(Broken(), [[0, 1, 2]], 8)


def test_no_document_to_predict() -> None:
    with pytest.raises(UserError) as raised:
        unigram_perplexity(np.ones(3, np.int64), [[1], [2]])
    assert str(raised.value) == (
        "the test split holds no document to measure perplexity on (2 documents, none of two tokens or more): give the"
        " third share of `split` more, or tokenize more documents"
    )

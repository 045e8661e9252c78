"""Perplexity of held-out documents, and that of a model that knows only how often each token occurs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmpipe.errors import UserError
from llmpipe.inference.loglikelihood import HasLogits, loglikelihoods

CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(Σ nll / Σ tokens), over every token of every document but each document's first."""

    nll: float
    """Σ -ln p, in nats."""
    tokens: int
    """Predicted ones."""
    documents: int

    @property
    def value(self) -> float:
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def model_perplexity(engine: HasLogits, documents: Sequence[Sequence[int]], window: int) -> Perplexity:
    """A model's; each document on its own. Past the window, each token sees at least half a window of context."""
    kept = predictable(documents)
    requests = [(document[:1], document[1:]) for document in kept]
    scores = loglikelihoods(engine, requests, window, max(1, window // 2), "perplexity")
    nll = -math.fsum(score.logprob for score in scores)
    if not math.isfinite(nll):
        raise UserError(f"the model gives held-out text a log-likelihood of {-nll}: its weights hold NaN or infinity")
    return Perplexity(nll, sum(len(document) - 1 for document in kept), len(kept))


def unigram_perplexity(counts: NDArray[np.int64], documents: Sequence[Sequence[int]]) -> Perplexity:
    """Of p(token) = (count + 1) / (Σ counts + V), the training tokens' counts (V,) with add-one smoothing."""
    kept = predictable(documents)
    logprobs = np.log(counts + 1.0) - math.log(float(counts.sum()) + len(counts))
    tokens = np.concatenate([np.asarray(document[1:]) for document in kept])
    return Perplexity(-float(logprobs[tokens].sum()), len(tokens), len(kept))


def count_tokens(tokens: NDArray[np.integer], vocab: int) -> NDArray[np.int64]:
    """(V,) how often each token occurs; read in parts, for the tokens may be a mapped file."""
    counts = np.zeros(vocab, np.int64)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        counts += np.bincount(tokens[start : start + CHUNK_TOKENS], minlength=vocab)
    return counts


def predictable(documents: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The documents of two tokens or more: the first token has nothing to be predicted from."""
    kept = [document for document in documents if len(document) > 1]
    if not kept:
        raise UserError(
            f"the test split holds no document to measure perplexity on ({len(documents)} documents, none of two tokens"
            " or more): give the third share of `split` more, or tokenize more documents"
        )
    return kept

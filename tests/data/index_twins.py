"""Slow NumPy twins of the compiled index, written from Megatron's description: the oracles of these tests."""

import numpy as np


def gpt_index(lengths, first, last, seq_len, num_samples, seed):
    random = np.random.RandomState(seed)
    part = np.arange(first, last, dtype=np.int32)
    tokens = int(lengths[first:last].sum())
    epochs = 1
    while epochs * tokens < num_samples * seq_len + 1:
        epochs += 1
    total = (epochs * tokens - 1) // seq_len
    before_last = ((epochs - 1) * tokens - 1) // seq_len
    apart = epochs > 1 and num_samples - before_last < int(0.80 * ((tokens - 1) // seq_len))
    if apart:
        documents = np.concatenate([_shuffled(random, np.tile(part, epochs - 1)), _shuffled(random, part)])
    else:
        documents = _shuffled(random, np.tile(part, epochs))
    together = before_last if apart else total
    samples = _sample_starts(lengths[documents], total, seq_len)
    numbers = np.arange(total, dtype=np.uint32)
    order = np.concatenate([_shuffled(random, numbers[:together]), _shuffled(random, numbers[together:])])
    return documents, samples, order


def _shuffled(random, values):
    values = values.copy()
    random.shuffle(values)
    return values


def _sample_starts(lengths, total, seq_len):
    """Where token k * seq_len of the documents laid end to end is."""
    ends = np.cumsum(lengths)
    positions = np.arange(total + 1) * seq_len
    documents = np.searchsorted(ends, positions, side="right")
    starts = np.stack([documents, positions - (ends - lengths)[documents]], axis=1)
    starts[0] = 0  # also where the first document is empty
    return starts


def blend_index(weights, num_samples):
    counts = np.zeros(len(weights), np.int64)
    datasets, samples = [], []
    for i in range(num_samples):
        chosen = int(np.argmax(np.array(weights) * max(i, 1) - counts))
        datasets.append(chosen)
        samples.append(counts[chosen])
        counts[chosen] += 1
    return np.array(datasets, np.int16), np.array(samples, np.int64)

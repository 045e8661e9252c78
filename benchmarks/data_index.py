"""The GPT index and random reads beside megatron-core's, in one run: seconds, samples a second, ratio.

    pip install --no-deps megatron-core==0.16.1
    python benchmarks/data_index.py WORK [--documents 2000000 20000000] [--rounds 3] [--reads 20000]

Index: documents of log-normal lengths (mean 900 tokens), 2.5 epochs' worth of samples of 4,096 tokens, so that three
are laid out and the last is shuffled apart. Megatron's is GPTDataset's own method, without writing its cache files; the
three arrays are compared. Reads: a dataset of --tokens random tokens in WORK, read once before; random samples in
batches of 64 and one by one, beside GPTDataset's __getitem__ and its query alone; the tokens are compared. Ours and
Megatron's take turns, medians of --rounds are printed as tables for docs/numbers/data.md.
"""

import argparse
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmpipe import helpers
from llmpipe.data.batches.sampling import Blend
from llmpipe.data.dataset.indexed import Reader, Writer

sys.path.append(str(Path(__file__).parent / "proof"))

SEQ_LEN, SEED, BATCH = 4096, 1234, 64
ALL = [1.0, 0.0, 0.0]


def lengths_of(num_documents: int) -> NDArray[np.int64]:
    """Tokens in each document."""
    drawn = np.random.default_rng(0).lognormal(6.3, 1.0, num_documents)
    return np.clip(drawn, 1, 100_000).astype(np.int64)


def megatron_index(lengths: NDArray[np.int64], num_samples: int) -> Callable[[], tuple[Any, ...]]:
    """GPTDataset's own method on a dataset that is its lengths alone."""
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    made = object.__new__(GPTDataset)
    made.config = SimpleNamespace(
        path_to_cache=None, mock=True, sequence_length=SEQ_LEN, random_seed=SEED, add_extra_token_to_sequence=True,
        defer_npy_index_mmap=False, fast_cache_load=False, drop_last_partial_validation_sequence=True,
    )  # fmt: skip
    made.dataset = SimpleNamespace(sequence_lengths=lengths.astype(np.int32))
    made.indices = np.arange(len(lengths), dtype=np.int32)
    made.num_samples, made.index_split = num_samples, Split.train
    return made._build_document_sample_shuffle_indices


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it took, and what it gave."""
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def measure_index(num_documents: int, rounds: int) -> list[float]:
    """Megatron's and our median seconds; AssertionError if an array differs."""
    lengths = lengths_of(num_documents)
    num_samples = int(2.5 * lengths.sum()) // SEQ_LEN
    theirs = megatron_index(lengths, num_samples)
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        took, expected = seconds(theirs)
        times[0].append(took)
        took, found = seconds(lambda: helpers.gpt_index(lengths, 0, num_documents, SEQ_LEN, num_samples, SEED))
        times[1].append(took)
        for ours, other in zip(found, expected, strict=True):
            assert np.array_equal(ours, other)
        del expected, found
    return [statistics.median(values) for values in times]


def make_dataset(prefix: Path, num_tokens: int) -> None:
    """A dataset of random tokens below 32,000."""
    lengths = lengths_of(num_tokens // 900)
    tokens = np.random.default_rng(1).integers(0, 32_000, int(lengths.sum()), np.uint16)
    with Writer(prefix, np.dtype(np.uint16)) as writer:
        writer.add(tokens, lengths)


def measure_reads(work: Path, num_tokens: int, reads: int, rounds: int) -> dict[str, float]:
    """Median samples a second of each way of reading; AssertionError if tokens differ."""
    import megatron_data

    make_dataset(work / "reads", num_tokens)
    num_samples = int(Reader(work / "reads").tokens.astype(np.int64).size) // SEQ_LEN - 1
    case = {"data": {"reads": 1.0}, "split": "1,0,0", "seq_len": SEQ_LEN, "num_samples": [num_samples, 0, 0]}
    theirs = megatron_data.build(work, case | {"seed": SEED})[0]
    ours = Blend({work / "reads": 1.0}, ALL, "train", SEQ_LEN, num_samples, SEED)
    wanted = np.random.default_rng(2).integers(0, num_samples, reads)
    for index in wanted[:200].tolist():
        sample = theirs[index]
        assert np.array_equal(ours[index][0], torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy())
    batches = wanted[: reads // BATCH * BATCH].reshape(-1, BATCH)
    ways: dict[str, Callable[[], Any]] = {
        "megatron-core, `__getitem__`": lambda: [theirs[i] for i in wanted.tolist()] and None,
        "megatron-core, its query alone": lambda: [
            len(theirs._query_document_sample_shuffle_indices(i)[0]) for i in wanted.tolist()
        ],
        "llmpipe, one by one": lambda: [len(ours[i][0]) for i in wanted.tolist()],
        f"llmpipe, batches of {BATCH}": lambda: [len(ours.read(batch)) for batch in batches],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way)[0])
    return {name: reads / statistics.median(values) for name, values in times.items()}


def machine() -> str:
    """The processor, the cores, and who else was at work."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0]}, load average {os.getloadavg()[0]:.1f} at the start"


def main(options: argparse.Namespace) -> None:
    """Both tables."""
    options.work.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)  # Megatron's, of caches that are not written
    torch.distributed.init_process_group("gloo", f"file://{options.work}/store-{os.getpid()}", rank=0, world_size=1)
    print(f"{machine()}; {options.rounds} rounds\n")
    print("| documents, three epochs | megatron-core, s | llmpipe, s | ratio |\n|---|---|---|---|")
    for num_documents in options.documents:
        theirs, ours = measure_index(num_documents, options.rounds)
        print(f"| {num_documents:,} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} |", flush=True)
    print("\n| samples of 4,097 tokens | a second | ratio |\n|---|---|---|")
    found = measure_reads(options.work, options.tokens, options.reads, options.rounds)
    first = next(iter(found.values()))
    for name, rate in found.items():
        print(f"| {name} | {rate:,.0f} | {rate / first:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--documents", type=int, nargs="*", default=[2_000_000, 20_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=130_000_000)
    main(parser.parse_args())

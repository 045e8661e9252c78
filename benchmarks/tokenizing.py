"""Encoders alone, peers beside llmpipe in one run; the whole command is benchmarks/tokenizing_peers.py.

WORK gets the corpus (benchmarks/corpus.py). Each measurement is a process of its own, so that caches are cold at its
first pass; peers take turns, and medians over --rounds are printed as tables for
docs/numbers/tokenizing.md. Speed is text in UTF-8 per CPU second of the process (user and system), which other work on
the machine disturbs less than the clock. Ids are compared with the tokenizer's own library, document by document.

    python benchmarks/tokenizing.py WORK --tokenizer DIR... [--rounds 3] [--megabytes 165]
        [--part alone --part same ...]

DIR: a tokenizer.model of SentencePiece or tiktoken, or tekken.json; for gigatoken, fastokens and tokenizers with the
tokenizer.json that llmpipe convert writes beside it. Peers that are not installed are left out.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corpus

BATCH_BYTES = 4 << 20
PEERS = ("llmpipe", "gigatoken", "fastokens", "reference", "tokenizers")
SLOW = {"reference": 20, "tokenizers": 5}
"""Megabytes that are enough for these."""


def batches(path: Path, megabytes: float) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    with path.open() as file:
        for line in file:
            batch.append(json.loads(line)["text"].encode())
            size += len(batch[-1])
            if size >= BATCH_BYTES:
                yield batch
                megabytes -= size / 1e6
                batch, size = [], 0
            if megabytes <= 0:
                return
    yield batch


def opened(peer: str, folder: Path) -> Callable[[list[bytes]], Any]:
    """A function that encodes a batch on one thread."""
    library_json = str(folder / "tokenizer.json")
    if peer == "gigatoken":
        import gigatoken

        giga = gigatoken.Tokenizer(library_json)
        return lambda batch: giga.encode_batch(batch, parallel=False)
    if peer == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_file(library_json)
        return lambda batch: fast.encode_batch_flat([text.decode() for text in batch], False)
    if peer == "tokenizers":
        import tokenizers

        library = tokenizers.Tokenizer.from_file(library_json)
        return lambda batch: library.encode_batch_fast([text.decode() for text in batch], add_special_tokens=False)
    from llmpipe.data.tokenizer import open_tokenizer
    from llmpipe.data.tokenizers.compiled import compiled, packed

    tokenizer = open_tokenizer(folder)
    if peer == "reference":
        return lambda batch: tokenizer.encode_batch(batch, 1)
    import numpy as np

    encoder, none = compiled(tokenizer).encoder, np.zeros(0, np.int32)
    return lambda batch: encoder.encode(*packed(batch), none, none)


def measure(peer: str, folder: Path, path: Path, megabytes: float) -> dict[str, float]:
    """Megabytes per CPU second with a cold and with a warm cache, and the memory that encoding added, in MB."""
    encode, texts = opened(peer, folder), list(batches(path, min(megabytes, SLOW.get(peer, megabytes))))
    size = sum(len(text) for batch in texts for text in batch) / 1e6
    before, found = anonymous(), {}
    for name in ("cold", "warm"):
        start = time.process_time()
        for batch in texts:
            encode(batch)
        found[name] = size / (time.process_time() - start)
    return {**found, "memory": anonymous() - before}


def anonymous() -> float:
    """The process's anonymous memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def differing(folder: Path, path: Path, megabytes: float) -> tuple[int, int]:
    """How many documents of the corpus have other ids than the tokenizer's library gives, of how many."""
    reference, wrong, count = opened("reference", folder), 0, 0
    own = opened("llmpipe", folder)
    for batch in batches(path, megabytes):
        ids, sizes = own(batch)
        start = 0
        for size, expected in zip(sizes.tolist(), reference(batch), strict=True):
            wrong += size >= 0 and ids[start : start + size].tolist() != expected
            start += max(size, 0)
            count += 1
    return wrong, count


def fuzz(folder: Path, count: int) -> int:
    """How many of so many short random texts have other ids."""
    draw, own, reference = random.Random(0), opened("llmpipe", folder), opened("reference", folder)
    pools = [
        "abc XYZ",
        "'sStTrReEvVlLmMdD\u017f ",
        "  \n\r\t\u00a0\u2028\u3000a",
        "019\u0663\u00bd ,.-/",
        "\u2581 a\u0301\u0300",
    ]
    pools += [
        "aB\u01c5\u02b0\u4e2d\u0301 '",
        "\U0001f469\u200d\ufe0f\U0001f3fd x",
        "<|s>/[INST]\n",
        "the and ing ed is ",
    ]
    wrong = 0
    for _ in range(count // 1000):
        texts = [draw.randbytes(draw.randrange(1, 40)).decode(errors="replace").encode() for _ in range(250)]
        texts += [
            "".join(chr(draw.randrange(0xD800)) for _ in range(draw.randrange(1, 12))).encode() for _ in range(150)
        ]
        texts += ["".join(draw.choices(draw.choice(pools), k=draw.randrange(1, 40))).encode() for _ in range(600)]
        (ids, sizes), start = own(texts), 0
        for size, expected in zip(sizes.tolist(), reference(texts), strict=True):
            wrong += size >= 0 and ids[start : start + size].tolist() != expected
            start += max(size, 0)
    return wrong


def long_lines(folder: Path) -> list[tuple[str, float, float, float]]:
    """A line of one character, 10 and 100 MB of it: seconds each, and memory beside the text and its ids in MB."""
    rows = []
    for name, character in (("a", b"a"), ("space", b" "), ("\u4e2d", "\u4e2d".encode())):
        encode, seconds = opened("llmpipe", folder), []
        for size in (10_000_000, 100_000_000):
            text, start, before = character * (size // len(character)), time.process_time(), anonymous()
            ids, _ = encode([text])
            seconds.append(time.process_time() - start)
        rows.append((name, *seconds, anonymous() - before - ids.nbytes / 1e6))
    return rows


def alone(folder: Path, path: Path, rounds: int, megabytes: float) -> None:
    """Print the table of encoders."""
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    for peer in [*PEERS] * rounds:
        worker = [sys.executable, __file__, "--measure", peer, str(folder), str(path), str(megabytes)]
        result = subprocess.run(worker, capture_output=True, text=True)
        if result.returncode:
            print(f"{peer} is left out: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        else:
            found[peer].append(json.loads(result.stdout))
    print("| encoder | MB/s cold | MB/s warm | memory, MB |\n|---|---|---|---|")
    for peer, results in found.items():
        if results:
            cold, warm, memory = (statistics.median(r[key] for r in results) for key in ("cold", "warm", "memory"))
            print(f"| {peer} | {cold:.1f} | {warm:.1f} | {memory:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=165)
    parser.add_argument("--part", choices=["alone", "same", "long", "fuzz"], action="append")
    options = parser.parse_args()
    path = options.work / "corpus.jsonl"
    if not path.exists():
        corpus.gather(path, int(options.megabytes * 1e6))
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for folder in options.tokenizer:
        print(f"\n## {folder.name}\n", flush=True)
        parts = options.part or ["alone", "same", "long", "fuzz"]
        if "alone" in parts:
            alone(folder, path, options.rounds, options.megabytes)
        if "same" in parts:
            print("{} of {} documents differ".format(*differing(folder, path, options.megabytes)), flush=True)
        if "fuzz" in parts:
            print(f"{fuzz(folder, 100_000)} of 100000 random texts differ", flush=True)
        if "long" in parts:
            for name, ten, hundred, memory in long_lines(folder):
                print(f"a line of {name}: 10 MB {ten:.2f} s, 100 MB {hundred:.2f} s, {memory:.0f} MB more", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]))))
    else:
        main()

"""Anonymous memory of `llmpipe tokenize` over corpora of several sizes: it does not grow with them.

Each corpus is that of benchmarks/corpus.py again and again, every document marked with the number of its round, so that
no two are the same. A line of Markdown for docs/numbers/tokenizing.md is printed for each tokenizer, size and number of
workers: the most that all processes hold together, looked at five times a second, and the bytes of one corpus in the
page cache do not count.

    python benchmarks/tokenizing_memory.py WORK --tokenizer DIR... [--gigabytes 0.165 1 4] [--workers 1 2]
"""

import argparse
import json
from pathlib import Path

import corpus
from tokenizing_peers import own, run

MEGABYTES = 165


def enlarged(small: Path, gigabytes: float, file: Path) -> Path:
    """The corpus repeated up to a size."""
    documents, written, number = [json.loads(line)["text"] for line in small.open()], 0, 0
    with file.open("w") as output:
        while written < gigabytes * 1e9:
            for text in documents:
                written += output.write(json.dumps({"text": f"{number} {text}"}, ensure_ascii=False) + "\n")
            number += 1
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.165, 1, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    small = options.work / "corpus.jsonl"
    if not small.exists():
        corpus.gather(small, int(MEGABYTES * 1e6))
    print(
        "| tokenizer | corpus, GB | workers | anonymous MB, all | CPU s | seconds |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for size in options.gigabytes:
        large = enlarged(small, size, options.work / "large.jsonl")
        gigabytes = large.stat().st_size / 1e9
        for folder in options.tokenizer:
            for workers in options.workers:
                cost = run(own(folder, workers, False)(large, options.work / "data"), options.work / "log")
                cells = folder.name, f"{gigabytes:.2f}", workers, f"{cost.anonymous:.0f}", f"{cost.cpu:.1f}"
                print("| " + " | ".join(map(str, (*cells, f"{cost.seconds:.1f}"))) + " |", flush=True)
        large.unlink()


if __name__ == "__main__":
    main()

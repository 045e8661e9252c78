"""Whole commands from .jsonl to .bin and .idx in turns: llmpipe tokenize, Megatron-LM's two scripts, datasets.map.

WORK gets the corpus (benchmarks/corpus.py) and what the commands write; a table for docs/numbers/tokenizing.md is
printed for each tokenizer. Slow commands get only the first --slow megabytes. As that would count their start-up too
often, each command also runs once on a single document, and the whole corpus is taken to cost
start-up + (measured - start-up) x corpus / part. Speed is text in UTF-8 per CPU second, user and system, of a command
and its children, start-up included. Peers have one worker or thread. Last column: whether the files are byte for byte
those of llmpipe with the same BOS and EOS, or how many documents have other ids.

    python benchmarks/tokenizing_peers.py WORK --tokenizer DIR... --megatron REPOSITORY --python PEER/bin/python
        [--rounds 2] [--megabytes 165] [--slow 20]

DIR: a tokenizer.model of SentencePiece or tiktoken (mistral_common-*.whl: data/tokenizer.model.v1,
llama_models-*.whl: llama3/tokenizer.model); the tokenizer.json for the peers is made beside it, as llmpipe convert
does. REPOSITORY: github.com/NVIDIA/Megatron-LM, commit d98e8a64dd (2026-08-22). PEER, an environment of its own, with
which both scripts run as they are (torch's wheel for CUDA brings the triton that they import; no GPU is needed):

    python3.12 -m venv PEER
    PEER/bin/pip install torch==2.13.0 transformers==5.24.0 sentencepiece==0.2.3 tiktoken==0.14 gigatoken==0.10.0
    PEER/bin/pip install omegaconf einops awkward
"""

import argparse
import contextlib
import filecmp
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import corpus
import numpy as np

from llmpipe.checkpoint import sentencepiece_model, tiktoken_file
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.tokenizers.ranks import is_tiktoken

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
POLL, SAMPLE = 0.02, 10  # seconds; memory is read at every tenth look
DATASETS_MAP = """
import sys, datasets, transformers
source, output, file = sys.argv[1:]
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file)
rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=output)
rows.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=["text"], load_from_cache_file=False)
"""


@dataclass
class Cost:
    """Of one run: seconds by the clock and of CPU, MB resident in its largest process, MB anonymous in all of them."""

    seconds: float
    cpu: float
    resident: float
    anonymous: float


@dataclass
class Command:
    """`line(source, prefix)` is what to run; `bos`: whether its documents start with BOS, None if it writes no .bin."""

    name: str
    line: Callable[[Path, Path], list[str]]
    bos: bool | None = None
    slow: bool = False
    start: Cost | None = None
    costs: list[Cost] = field(default_factory=list)


def own(folder: Path, workers: int, bos: bool) -> Callable[[Path, Path], list[str]]:
    def line(source: Path, prefix: Path) -> list[str]:
        rest = ["--workers", str(workers), "--bos" if bos else "--no-bos", "--output", str(prefix)]
        return [sys.executable, "-m", "llmpipe", "tokenize", str(source), "--tokenizer", str(folder), *rest]

    return line


def megatron(python: str, script: Path, *options: str) -> Callable[[Path, Path], list[str]]:
    def line(source: Path, prefix: Path) -> list[str]:
        rest = ["--append-eod", "--input", str(source), "--output-prefix", str(prefix)]
        return [python, str(script), *options, *rest]

    return line


def datasets_map(folder: Path) -> Callable[[Path, Path], list[str]]:
    return lambda source, prefix: [
        *(sys.executable, "-c", DATASETS_MAP),
        *(str(source), str(prefix.parent / "cache"), str(folder / "tokenizer.json")),
    ]


def commands(folder: Path, python: str, repository: Path) -> list[Command]:
    """Ours first; every other one is compared with it."""
    tools, model = repository / "tools", folder / "tokenizer.model"
    hugging = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder))
    kind = hugging if is_tiktoken(model) else ("--tokenizer-type", "SentencePieceTokenizer")
    if kind != hugging:
        kind += ("--tokenizer-model", str(model))
    plain = megatron(python, tools / "preprocess_data.py", *kind, "--workers", "1")
    fast = megatron(python, tools / "preprocess_data_fast.py", *hugging, "--use-gigatoken")
    return [
        Command("llmpipe tokenize --workers 1", own(folder, 1, False), bos=False),
        Command("llmpipe tokenize --workers 2", own(folder, 2, False), bos=False),
        Command(f"Megatron-LM preprocess_data.py, {kind[1]}", plain, bos=kind == hugging, slow=True),
        Command("Megatron-LM preprocess_data_fast.py (gigatoken)", fast, bos=False),
        Command("datasets.map, fast tokenizer (writes Arrow)", datasets_map(folder), slow=True),
    ]


def complete(folder: Path) -> None:
    """Write tokenizer.json and its configuration beside a tokenizer.model."""
    model = folder / "tokenizer.model"
    if is_tiktoken(model):
        made, settings = tiktoken_file.build(model, named=True), tiktoken_file.config(8192)
    else:
        truth = sentencepiece_model.load(model)
        made, settings = sentencepiece_model.build(truth, model), sentencepiece_model.config(truth, 8192)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def processes(pid: int) -> Iterator[int]:
    """A process and its children, theirs, and so on."""
    yield pid
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in file.read_text().split():
            yield from processes(int(child))


def anonymous(pid: int) -> float:
    """MB of anonymous memory of a process; what it shares with others since a fork is divided among them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon")) / 1024


def run(line: list[str], log: Path) -> Cost:
    """Run to the end, with its output in `log`; SystemExit if it fails."""
    environment = os.environ | ONE_THREAD | OFFLINE
    start, most = time.monotonic(), 0.0
    with log.open("wb") as output:
        child = subprocess.Popen(line, stdout=output, stderr=output, env=environment)
    for count in itertools.count():
        pid, status, used = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
        if count % SAMPLE == 0:
            with contextlib.suppress(OSError):  # one of them has just ended
                most = max(most, sum(map(anonymous, processes(child.pid))))
        time.sleep(POLL)
    seconds, child.returncode = time.monotonic() - start, os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(line)} fails:\n{log.read_text()[-2000:]}")
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, most)


def execute(command: Command, source: Path, place: Path) -> Cost:
    """Run a command once into an empty folder, with its input in the page cache."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    source.read_bytes()
    return run(command.line(source, place / "data"), place / "log")


def same(expected: Path, found: Path) -> str:
    """How two datasets compare; without suffix, Megatron-LM adds one of its own."""
    pairs = [
        (expected.with_name(f"{expected.name}{end}"), next(found.parent.glob(f"*{end}"))) for end in (".bin", ".idx")
    ]
    if all(filecmp.cmp(*pair, shallow=False) for pair in pairs):
        return "yes"
    ours, theirs = Reader(expected), Reader(pairs[1][1].with_suffix(""))
    if ours.num_documents != theirs.num_documents:
        return f"{theirs.num_documents} documents instead of {ours.num_documents}"
    differ = sum(not np.array_equal(ours.read(i), theirs.read(i)) for i in range(ours.num_documents))
    return f"{differ} of {ours.num_documents} documents differ"


def parity(command: Command, folder: Path, source: Path, work: Path) -> str:
    """The last column of a command that has just been run."""
    if command.bos is None:
        return ""
    reference = Command("reference", own(folder, 1, command.bos))
    execute(reference, source, work / "reference")
    return same(work / "reference" / "data", work / "out" / "data")


def table(found: list[Command], sizes: dict[bool, float], words: list[str]) -> Iterator[str]:
    """A line of Markdown for each command; `sizes`: MB of the whole corpus and (True) of the part for slow ones."""
    columns = [
        "command",
        "MB run",
        "s",
        "CPU s",
        "of it start-up",
        "MB/s of CPU, whole corpus",
        "ours is faster, of CPU",
    ]
    columns += ["resident MB", "anonymous MB", "the same files"]
    yield from (f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")
    first = 0.0
    for command, word in zip(found, words, strict=True):
        start, scale = command.start, sizes[False] / sizes[command.slow]
        assert start is not None
        seconds, spent = (statistics.median(getattr(c, name) for c in command.costs) for name in ("seconds", "cpu"))
        cpu = start.cpu + (spent - start.cpu) * scale
        first = first or cpu
        memory = (max(getattr(c, name) for c in command.costs) for name in ("resident", "anonymous"))
        yield (
            f"| {command.name} | {sizes[command.slow]:.0f} | {seconds:.1f} | {spent:.1f} | {start.cpu:.1f}"
            f" | {sizes[False] / cpu:.1f} | {cpu / first:.1f} x | {' | '.join(f'{m:.0f}' for m in memory)} | {word} |"
        )


def measure(folder: Path, options: argparse.Namespace, sources: dict[bool, Path]) -> list[str]:
    """The table of a tokenizer."""
    complete(folder)
    found, work, words = commands(folder, options.python, options.megatron.resolve()), options.work, []
    one = head(sources[False], work / "one.jsonl", 0)
    for command in found:
        command.start = execute(command, one, work / "out")
    for turn in range(options.rounds):
        for command in found:
            command.costs.append(execute(command, sources[command.slow], work / "out"))
            if turn == 0:
                words.append(parity(command, folder, sources[command.slow], work))
            print(f"{command.name}: {command.costs[-1]}", file=sys.stderr, flush=True)
    sizes = {slow: text_size(source) for slow, source in sources.items()}
    return list(table(found, sizes, words))


def text_size(path: Path) -> float:
    """MB of text in a file of JSON lines."""
    with path.open("rb") as file:
        return sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6


def head(source: Path, target: Path, megabytes: float) -> Path:
    """Write the first documents of a corpus, one at least and `megabytes` of text."""
    with source.open("rb") as file, target.open("wb") as output:
        for line in file:
            output.write(line)
            megabytes -= len(json.loads(line)["text"].encode()) / 1e6
            if megabytes <= 0:
                return target
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", type=Path, nargs="+", required=True)
    parser.add_argument("--megatron", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--python", required=True, help="the Python with what Megatron-LM imports")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=165)
    parser.add_argument("--slow", type=float, default=20, help="megabytes for the slow commands")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "corpus.jsonl"
    if not path.exists():
        corpus.gather(path, int(options.megabytes * 1e6))
    sources = {False: path, True: head(path, options.work / "part.jsonl", options.slow)}
    for folder in options.tokenizer:
        rows = measure(folder, options, sources)
        print(f"\n### {folder.name}\n", *rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()

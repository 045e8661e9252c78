"""Megatron-LM's own loaders on directories that llmpipe wrote: they load strictly, and its savers write them again.

Run after megatron_lm.py, in its Python, with the path of an installed llmpipe:

    python benchmarks/proof/megatron_lm_ours.py REPOSITORY WORK LLMPIPE docs/proof/megatron_lm.json

For each case: tiny checkpoint → `llmpipe convert --to megatron` → tools/checkpoint/convert.py, whose loader builds the
models and calls load_state_dict(strict=True) → the case's digests. Prints a line a case; exit code 1 if one differs.
(Its legacy saver cannot write another padded vocabulary than it reads: those cases keep it.)
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
import torch
from megatron_lm import described, run

# The shape, how we write it, and the case in the record that the original's saver has to write of it.
CASES = [
    ("gqa_8_2", "float32", "mcore", ("--tp", "2", "--pp", "2"), 0),
    ("gqa_8_2", "float32", "mcore", ("--tp", "1", "--pp", "2", "--vp", "2"), 7),
    ("gqa_6_3", "bfloat16", "mcore", ("--tp", "3"), 1),
    ("gqa_12_4", "float16", "mcore", ("--tp", "2", "--pp", "4"), 2),
    ("gqa_8_2", "float32", "legacy", ("--tp", "1", "--pp", "4"), 4),
    ("gqa_8_2", "float32", "legacy", ("--tp", "2", "--pp", "2", "--vp", "2"), 8),
    ("gqa_6_3", "bfloat16", "legacy", ("--tp", "1"), 5),
    ("gqa_12_4", "float16", "legacy", ("--tp", "4"), 6),
    ("gqa_8_2", "bfloat16", "mcore", ("--tp", "1", "--pp", "4"), 11),  # Mistrals
    ("gqa_6_3", "float32", "legacy", ("--tp", "1", "--pp", "4"), 12),
]
PLUGINS = {"mcore": "mcore", "legacy": "megatron"}


def main(options: argparse.Namespace) -> int:
    """Every case; the number of those that differ."""
    sys.path.insert(0, str(options.repository))  # the files name its classes, which need no Transformer Engine
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    record = json.loads(options.record.read_text())["cases"]
    different = 0
    for number, (shape, dtype, dialect, layout, wanted) in enumerate(CASES):
        work = options.work / f"ours-{number}"
        shutil.rmtree(work, ignore_errors=True)
        case, plugin = record[wanted], PLUGINS[dialect]
        tiny.write(shape, work / "hf", getattr(torch, dtype), **case.get("config.json", {}))
        ours = [
            "convert",
            work / "hf",
            "--output",
            work / "megatron",
            "--to",
            "megatron",
            "--dialect",
            dialect,
            *layout,
        ]
        subprocess.run([options.llmpipe, *map(str, ours)], check=True)
        rest = ["--model-type", "GPT", "--loader", plugin, "--saver", plugin, "--load-dir", work / "megatron"]
        rest += ["--save-dir", work / "again", "--true-vocab-size", tiny.SHAPES[shape][-1]]
        rest += ["--target-tensor-parallel-size", case["tp"], "--target-pipeline-parallel-size", case["pp"]]
        rest += ["--loader-transformer-impl", "transformer_engine"] if dialect == "mcore" else []
        failed = run(options, "convert", rest).wait() != 0
        same = not failed and described(work / "again")["files"] == case["files"]
        print(f"{'same' if same else 'DIFFERENT'}: {dialect} {shape} {dtype} {' '.join(layout)} → case {wanted}")
        different += not same
    return different


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("repository", "work", "llmpipe", "record"):
        parser.add_argument(name, type=Path)
    sys.exit(main(parser.parse_args()) > 0)

"""The whole parity matrix: each layout, family, packing and number of micro-batches against one process, 20 steps.

    python benchmarks/layout_parity.py --output docs/numbers/layout_parity.md

The matrix is that of the tests (tests/train/parity.py), whose suite trains in each layout once. Exit status 1 if any
training is further from one process than it may be.
"""

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/train"))
from jobs import losses, run_job
from parity import FAMILIES, GRAD_NORM, LAYOUTS, LOSS, TIED, WEIGHTS, Cell, Difference, Matrix, cells, compare

HEAD = f"""# Every layout trains the same

Llama with grouped queries and Falcon with one KV head, of random weights: hidden 64, four layers, micro-batches of two
sequences of 64 tokens; in fp32 on the CPU, over gloo. Each layout is trained for 20 steps with each family, chats
packed and not, and with 1 and 4 micro-batches a step on each data rank, pipelines with 4 and 8: eight trainings, each
compared with the same global batches in one process. The row has the worst of the eight: loss and gradient norm of the
worst step, and the worst tensor's relative L2 after step 20. Asked for: {LOSS:g}, {GRAD_NORM:g} and {WEIGHTS:.0e}.
`benchmarks/layout_parity.py`, in `make drill`; `make test` trains in each layout once. Data ranks share parameters out
in full (FSDP2) where the row says no other kind. The first row is the noise of one process alone: micro-batches of one
sequence beside two.
"""


def noise(matrix: Matrix) -> list[Difference]:
    """One process with other micro-batches than another one."""
    found = []
    for cell in (Cell("one process", family, packing, 4) for family in FAMILIES for packing in (True, False)):
        with tempfile.TemporaryDirectory() as run:
            job = matrix.job(cell, Path(run))
            job = replace(job, layout=replace(job.layout, micro_batch=1))
            found.append(compare((job, run_job(job)), matrix.alone(cell)))
    return found


def row(layout: str, differences: list[Difference]) -> str:
    """The worst of each."""
    weights = max(differences, key=lambda difference: difference.weights)
    loss, norm = (max(getattr(found, name) for found in differences) for name in ("loss", "grad_norm"))
    return f"| {layout} | {loss:.1e} | {norm:.1e} | {weights.weights:.1e} | {weights.tensor} |"


def trained(matrix: Matrix, layout: str) -> list[Difference]:
    """All trainings in a layout; one that differs is told at once."""
    found = []
    for cell in cells(layout):
        with tempfile.TemporaryDirectory() as run:
            found.append(matrix.difference(cell, Path(run)))
        if not found[-1].is_small:
            print(f"{cell}: {found[-1]}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the page; left out, it goes to standard output")
    output, start = parser.parse_args().output, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder))
        rows = ["| layout | loss | gradient norm | weights | tensor |", "|---|---:|---:|---:|---|"]
        rows.append(row("one process", noise(matrix)))
        all_found: list[Difference] = []
        for layout in LAYOUTS | TIED:
            found = trained(matrix, layout)
            rows.append(row(layout, found))
            all_found += found
            print(rows[-1], file=sys.stderr, flush=True)
        loss = losses(matrix.alone(Cell("one process", "Llama", True, 4))[1])
    wrong = sum(not found.is_small for found in all_found)
    end = [
        f"{len(all_found)} trainings, {wrong} too far off; Llama's loss falls from {loss[0]:.3f} to {loss[-1]:.3f}.",
        f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {torch.__version__};"
        f" {(time.monotonic() - start) / 60:.0f} minutes.",
    ]
    page = "\n".join([HEAD, *rows, "", *end]) + "\n"
    if output:
        output.write_text(page)
    else:
        print(page, end="")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

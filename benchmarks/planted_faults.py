"""Faults planted in correct conversions, one at a time, and what `llmpipe verify` says of each, and of no fault.

    python benchmarks/planted_faults.py --output docs/numbers/verification.md

Every conversion of the test matrix (tests/matrix: families x formats x TP x PP) is verified in both directions, and
adapters of every kind are merged: none may be refused. Then each route's subject gets one fault after the other, signed
anew, so that only the verification can find it. The page has the margins of both: the largest value of each check in a
correct conversion, and for each fault the smallest by which a check exceeds its limit.
"""

import argparse
import logging
import platform
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/matrix"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/verify"))
from matrix_cells import FORMATS, HOLDS, RANKS, SPLITS, back, deal, make, there
from matrix_models import MODELS, save
from merge_faults import MERGE_FAULTS
from peft_files import KINDS, make_adapter
from planted import NOT_KNOWN, Found, ask, edit, margin, plant_all, sign

from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import convert
from llmpipe.checkpoint.formats import Told, open_source

PROCESSES = ("2x2", "4x1", "1x3")
"""Layouts of rank files whose forward is run in tp x pp processes for every model that they fit."""


def correct(name: str, folder: Path) -> list[Found]:
    """Every conversion of a model, verified there and back."""
    made, found = make(name, folder), []
    found.append(ask("Hugging Face", "", made.checkpoint, made.hf, folder))
    for number, layout in enumerate(HOLDS[name]):
        written = there(made, layout, folder / f"{number}/there")
        again = back(made, written, folder / f"{number}/back")
        found.append(ask(layout, "", again, written, folder))
        found.append(ask(layout, "", written, made.checkpoint, folder))
    for layout in PROCESSES:
        if layout in SPLITS.get(name, RANKS):
            ranks = deal(made, layout, folder / f"ranks {layout}")
            found.append(ask("rank files", "", ranks, made.checkpoint, folder))
    return found


MERGED = "adapter merged → checkpoint"
ADAPTED = {"llama": "meta 2", "biases": "mcore 2x2", "mistral": "epf 2x2", "falcon new decoder": "epf 2x2",
           "qwen2": "legacy 2x2", "qwen3": "mcore 1x1", "tied": "easylm"}  # fmt: skip
"""Models that adapters of every kind are merged into, and the format that the base also comes from."""


def merged(name: str, folder: Path) -> list[Found]:
    """An adapter of each kind merged into Hugging Face's files, and into another format's."""
    source, found = save(name, folder / "source"), []
    told = Told(open_source(source).shape)
    convert(source, folder / "there", FORMATS[ADAPTED[name]])
    for kind in KINDS:
        make_adapter(kind, load_file(source / "model.safetensors"), folder / kind)
        for base in (source, folder / "there"):
            convert(base, folder / "subject", told=told, changes=Changes(folder / kind))
            found.append(ask(MERGED, "", folder / "subject", base, folder))
    return found


def wrongly_merged(fault: str, folder: Path) -> Found:
    """What verify says of a wrong merge."""
    kind, wrong = MERGE_FAULTS[fault]
    source = save("llama", folder / "source")
    base = load_file(source / "model.safetensors")
    good = make_adapter(kind, base, folder / "adapter")
    convert(source, folder / "subject", changes=Changes(folder / "adapter"))
    edit(folder / "subject", lambda draft: draft.tensors.update(wrong(base, good)))
    sign(folder / "subject")
    return ask(MERGED, f"adapter: {fault}", folder / "subject", source, folder)


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)


def correct_table(right: list[Found]) -> list[str]:
    """The largest value of each check, and its limit."""
    values: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for found in right:
        for check in found.checks:
            if check["value"] is not None:
                values[check["name"]].append(check)
    rows = ["| check | measured | largest | limit | limit / largest |", "|---|---:|---:|---:|---:|"]
    for name, checks in values.items():
        worst = max(checks, key=lambda check: check["value"])
        limit, value = worst["limit"], worst["value"]
        ratio = f"{limit / value:.0f}" if limit and value else "-"
        limit = "-" if limit is None else f"{limit:g}"
        rows.append(f"| {name} | {len(checks)} | {number(value)} | {limit} | {ratio} |")
    return rows


def fault_table(planted: list[Found]) -> list[str]:
    """Each kind of fault: where it was planted, what found it, and the least that any check exceeded its limit by."""
    kinds: dict[str, list[Found]] = defaultdict(list)
    for found in planted:
        kinds[found.fault].append(found)
    columns = "fault | routes | caught | by the logits | least | by the bytes | by the way back | by settings or files"
    rows = [f"| {columns} | found first at |", "|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    for name, each in kinds.items():
        forward = [max((margin(c) for c in f.by if c["limit"]), default=0) for f in each]
        seen = [value for value in forward if value]
        least = min(seen, default=0)
        bytes_ = sum(any(c["name"] in BYTES for c in f.by) for f in each)
        trips = sum(any(c["name"] == TRIP for c in f.by) for f in each)
        others = sum(
            any(c["name"] not in {*BYTES, TRIP} and not c["limit"] for c in f.by) or not f.checks for f in each
        )
        weakest = min(each, key=lambda found: len(found.by) or 99)
        first = short(weakest.first)
        shown = "-" if not seen else "∞" if least == float("inf") else f"{least:.1g} times"
        caught = sum(found.caught for found in each)
        finds = f"{bytes_} | {trips} | {others} | {first}"
        rows.append(f"| {name} | {len(each)} | {caught} | {len(seen)} | {shown} | {finds} |")
    return rows


TRIP = "round trip"
BYTES = {"parameters", "tensors without a partner", "slices not bit-equal", "tensors missing or left over",
         "tables with other rows in their padding", "storage"}  # fmt: skip


def short(text: str) -> str:
    """Without the path of a run's folder, in one line."""
    text = " ".join(re.split(r"/(?:subject|checkpoint)\b", text)[-1].lstrip("/: ").split()).replace("|", "\\|")
    return text if len(text) <= 90 else text[:87] + "..."


def page(right: list[Found], planted: list[Found], seconds: float) -> str:
    known = [found for found in planted if (found.route, found.fault) in NOT_KNOWN]
    planted = [found for found in planted if found not in known]
    refused = [found for found in right if found.caught]
    missed = [found for found in planted if not found.caught]
    kinds, routes = {found.fault for found in planted}, len({found.route for found in planted})
    lines = [
        "# What verification finds, and what it lets pass", "",
        "`benchmarks/planted_faults.py`. Tiny random models by transformers, of every family, in fp32, on one",
        "route in bf16; formats and layouts are those of tests/matrix, the adapters those of tests/verify.", "",
        f"- correct conversions verified: {len(right)}; refused: {len(refused)}",
        f"- faults planted: {len(planted)} of {len(kinds)} kinds on {routes} routes; not found: {len(missed)}", "",
        "## Correct conversions", "", *correct_table(right), "",
        "## Planted faults", "",
        "By the logits: the routes where the logits, the loss or the divergence exceed their limit, and by how much",
        "the worst of these exceeds it at least (∞: no number came out: another size, NaN). Faults that the logits do",
        "not show are found by the bytes, the settings or the files. The way back is the row `round trip`, which a",
        "merged adapter and rank files do not have.",
        "", *fault_table(planted), "",
        *[f"- **not found**: {found.fault} ({found.route})" for found in missed],
        *[f"- **refused**: {found.route}: {found.first}" for found in refused],
        "## What no comparison of files can find", "",
        *[f"- {found.fault}, {found.route}: {NOT_KNOWN[found.route, found.fault]}" for found in known], "",
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} CPU, Python {platform.python_version()}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}; {seconds:.0f} s.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the page; left out, it goes to standard output")
    output = parser.parse_args().output
    logging.getLogger("llmpipe").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    start, right, planted = time.time(), [], []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            right += correct(name, Path(folder))
        print(f"{name}: {len(right)} correct, {sum(found.caught for found in right)} refused", flush=True)
    for name in ADAPTED:
        with tempfile.TemporaryDirectory() as folder:
            right += merged(name, Path(folder))
    print(f"adapters: {len(right)} correct, {sum(found.caught for found in right)} refused", flush=True)
    for fault in MERGE_FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            planted.append(wrongly_merged(fault, Path(folder)))
    for found in plant_all():
        (planted if found.fault else right).append(found)
        if found.caught != bool(found.fault):
            print(f"{found.route}: {found.fault or 'refused'}: {found.first}", flush=True)
    text = page(right, planted, time.time() - start)
    if output:
        output.write_text(text)
    else:
        print(text, end="")
    wrong = [found for found in right if found.caught]
    wrong += [found for found in planted if not found.caught and (found.route, found.fault) not in NOT_KNOWN]
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

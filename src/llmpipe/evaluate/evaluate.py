"""An evaluation from start to end: each model measured, the table published."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from llmpipe.checkpoint.formats import open_source
from llmpipe.config import PERPLEXITY
from llmpipe.data.batches.fit import check_tokenizer, check_vocab
from llmpipe.data.batches.held_out import heldout
from llmpipe.data.batches.sampling import part_of
from llmpipe.data.dataset.indexed import Reader
from llmpipe.data.tokenizer import open_tokenizer
from llmpipe.errors import UserError
from llmpipe.evaluate.perplexity import count_tokens, model_perplexity, unigram_perplexity
from llmpipe.evaluate.plan import Plan
from llmpipe.evaluate.table import Measure, rows, write_table
from llmpipe.files import atomic_directory
from llmpipe.inference.forward import Engine
from llmpipe.layout import Layout
from llmpipe.parallel import gpus
from llmpipe.parallel.groups import make_groups, rank_device
from llmpipe.parallel.processes import run_ranks
from llmpipe.train.record import identity

log = logging.getLogger(__name__)

OFFLINE = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
OpenEngine = Callable[[Path], Engine]


def run(plan: Plan, output: Path, device: str, tp: int) -> None:
    """Evaluate in this process, or in tp of them."""
    check_output(output)
    gpus.check_device(Layout(tp=tp, gpus_per_node=tp, device=device))  # type: ignore[arg-type]
    if plan.offline:
        for name in OFFLINE:  # before lm-eval imports datasets
            os.environ.setdefault(name, "1")
    with gpus.taken(tp if device == "cuda" else 0):
        if tp == 1:
            evaluate(plan, output, lambda path: Engine.open(path, inference_dtype(path, device), device))
        else:
            run_ranks(evaluate_rank, tp, plan, output, device, tp, device=device)


def check_output(output: Path) -> None:
    """UserError if writing the table would replace a directory of something else."""
    found = sorted(entry.name for entry in output.glob("*") if entry.name != ".snakemake_timestamp")
    if found and "table.json" not in found:
        raise UserError(
            f"--output {output} holds {', '.join(found[:4])} and no table.json: it is no evaluation, and evaluate does"
            " not replace it: name another directory or remove it"
        )


def inference_dtype(path: Path, device: str) -> torch.dtype:
    """fp32 on the CPU, as stored on a GPU."""
    return torch.float32 if device == "cpu" else open_source(path).dtype("embedding.weight")


def evaluate_rank(plan: Plan, output: Path, device: str, tp: int) -> None:
    """`evaluate` in one of tp processes."""
    if dist.get_rank() != 0:  # one bar and one log
        logging.disable()
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    groups = make_groups(Layout(tp=tp, gpus_per_node=tp).resolved(), rank_device(device))
    evaluate(plan, output, lambda path: Engine.open(path, inference_dtype(path, device), str(groups.device), groups))


def evaluate(plan: Plan, output: Path, open_engine: OpenEngine) -> None:
    """Measure the weights, and the reference if there is one, and publish the table in `output`.

    Every rank of a split model calls it together; rank 0 writes.
    """
    after = measure(plan, plan.weights, open_engine)
    before = measure(plan, plan.reference, open_engine) if plan.reference else None
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    reference = identity(plan.reference) if plan.reference else None
    with atomic_directory(output) as folder:
        write_table(folder, identity(plan.weights), reference, rows(after, before))


def measure(plan: Plan, weights: Path, open_engine: OpenEngine) -> list[Measure]:
    """All tasks with one model."""
    tokenizer = open_tokenizer(weights)
    engine = open_engine(weights)
    window = min(plan.seq_len or engine.shape.max_positions, engine.shape.max_positions)
    found: list[Measure] = []
    if PERPLEXITY in plan.tasks:
        for prefix in map(Path, plan.data):
            check_tokenizer(prefix, tokenizer.path)
            check_vocab(prefix, engine.shape.vocab)
            name = PERPLEXITY if len(plan.data) == 1 else f"{PERPLEXITY}/{prefix.name}"
            found += measure_perplexity(name, prefix, plan, engine, window)
    if plan.harness_tasks:
        from llmpipe.evaluate.harness import HarnessModel, run_tasks  # lm-eval takes seconds to import

        found += run_tasks(HarnessModel(engine, tokenizer, window), plan.harness_tasks)
    return found


def measure_perplexity(name: str, prefix: Path, plan: Plan, engine: Engine, window: int) -> list[Measure]:
    """The model's on the test documents, and the unigram baseline's on the same tokens."""
    test = [document.tolist() for document in heldout(prefix, plan.split, "test", sys.maxsize)]
    trained = [(Path(one), [1.0, 0.0, 0.0]) for one in plan.trained_on] or [(prefix, plan.split)]
    counts = sum(count_tokens(train_tokens(*one), engine.shape.vocab) for one in trained)
    assert isinstance(counts, np.ndarray)
    model, unigram = model_perplexity(engine, test, window), unigram_perplexity(counts, test)
    log.info("%s: perplexity %.3f, unigram %.3f, %s tokens", prefix, model.value, unigram.value, model.tokens)
    return [
        Measure(name, "perplexity", model.value, None, model.documents),
        Measure(name, "unigram_perplexity", unigram.value, None, unigram.documents),
    ]


def train_tokens(prefix: Path, split: list[float]) -> NDArray[np.integer]:
    """The training documents' tokens end to end, mapped from the file."""
    reader = Reader(prefix)
    documents = part_of(reader, split, "train")
    return reader.tokens[reader.starts[documents.start] : reader.starts[documents.stop]]

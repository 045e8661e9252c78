"""What a job of each stage asks of a node: memory in MB and time in minutes, from sizes, layouts and bytes.

docs/slurm.md has the table; slurm/config.yaml may name other numbers. Sizes that are not known yet, of a model whose
file names no shape and that is not converted, count as none: Snakemake asks again before it submits the job.
"""

import math
from collections import Counter
from pathlib import Path

from llmpipe.config import HUB, PERPLEXITY
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config, layer_of, named_size
from llmpipe.files import matching, read_json
from llmpipe.project.configs import corpus, layout, model, recipe_file, run
from llmpipe.project.options import evaluate_gpus, evaluate_threads
from llmpipe.project.outputs import dataset, dataset_files, fetched
from llmpipe.recipe import Recipe
from llmpipe.yaml_file import load

MB = 1_000_000
PROCESS = 4_000
"""Python, torch and buffers, below 500 as docs/numbers/conversion.md has them, and Snakemake's own two processes."""
WORKERS, WORKER = 8, 500
"""Of tokenize, and what each takes with a line of 100 MB (docs/numbers/tokenizing.md)."""
TOKENIZE = PROCESS + WORKERS * WORKER
RANK = {"cpu": 2_000, "cuda": 8_000}
"""A process of a training without its weights; with a GPU, what CUDA and NCCL keep in the machine's memory."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WHOLE_FP32 = 1.3 * 4
"""Bytes an element, for a check that loads the whole model, and that is left out where memory is short."""
MOST_OF_A_CHECK = 200_000
BLOCKS_FP32 = 3 * 4
"""Bytes an element of the largest block: one of either side, and one that is being read."""
REPORT_INDEX = 3
"""Bytes for each one of a dataset's .idx files, of a report, which packs all chats; 2.4 measured, of two million."""
START, DAY, WEIGHTS_A_MINUTE, TEXT_A_MINUTE = 30, 1_440, 3_000, 30
"""Minutes whatever the size, and the most that most clusters give; MB of a slow disk, and of a slow tokenizer."""
MODELS, READ_TWICE, TASK_TOKENS = 2, 2, 50_000_000
"""Of an evaluation: the run beside what it started from; windows overlap by half; what a large lm-eval task reads."""
TASK_MINUTES = 480
"""At the least, with a task of lm-eval: what it reads, and whether it writes text, which is slow, no file says."""
FLOP_A_SECOND = {"cpu": 1e10, "cuda": 5e13}
"""Of a CPU thread and of a GPU, where they are slow."""


def verify_memory(model_name: str) -> int:
    """One block of either side at a time."""
    shape = _shape(model_name)
    return PROCESS + _mb(BLOCKS_FP32 * (_largest_block(shape) if shape else 0))


def whole_memory(model_name: str) -> int:
    """The whole model, if that is not beyond most nodes."""
    whole = _mb(WHOLE_FP32 * _parameters(model_name))
    return PROCESS + whole if whole <= MOST_OF_A_CHECK else verify_memory(model_name)


def finetune_memory(run_name: str) -> int:
    """Of all of a node's ranks, with the copies of weights and optimizer state that checkpoints are written from.

    On GPUs these are in pinned memory, which torch rounds up to powers of two; on the CPU weights, state and gradients
    themselves stand beside them. At the end one rank of each slice has all of that slice's weights, to publish them.
    """
    placed, recipe = layout(run_name), load(Recipe, Path(recipe_file(run_name)))
    slices = placed.tp * placed.pp
    elements = _parameters(run(run_name).model) / slices
    state = {"cuda": 2, "cpu": 3}[placed.device] * 3 * BYTES[recipe.parameters] * elements / placed.shards
    published = min(slices, placed.gpus_per_node) * BYTES[recipe.precision] * elements
    return placed.gpus_per_node * (RANK[placed.device] + _mb(state)) + _mb(published)


def evaluate_memory(run_name: str) -> int:
    """Weights of a GPU pass through; on the CPU they stay, in fp32."""
    if gpus := evaluate_gpus(run_name):
        return PROCESS + gpus * RANK["cuda"]
    return PROCESS + _mb(WHOLE_FP32 * _parameters(run(run_name).model))


def evaluate_minutes(run_name: str) -> int:
    """To read both models, and to run them over test documents and lm-eval's tasks: 2 FLOP a parameter and token.

    Up to a day, for the job would stay in the queue on most clusters; slurm/config.yaml may name more.
    """
    parameters, found = _parameters(run(run_name).model), run(run_name)
    harness_tasks = len([task for task in found.evaluate if task != PERPLEXITY])
    tokens = TASK_TOKENS * harness_tasks
    tokens += READ_TWICE * _test_tokens(run_name) if PERPLEXITY in found.evaluate else 0
    device, processors = layout(run_name).device, evaluate_gpus(run_name) or evaluate_threads(run_name)
    seconds = MODELS * 2 * parameters * tokens / (processors * FLOP_A_SECOND[device])
    minutes = _minutes(MODELS * 4 * parameters) + math.ceil(seconds / 60)
    return min(max(minutes, TASK_MINUTES if harness_tasks else 0), DAY)


def export_memory(run_name: str) -> int:
    """That of its checks."""
    return whole_memory(run(run_name).model)


def report_memory(run_name: str) -> int:
    """Lengths and packed rows of all documents of its data."""
    return PROCESS + _mb(REPORT_INDEX * sum(_bytes(path) for path in _data(run_name) if path.suffix == ".idx"))


def report_minutes(run_name: str) -> int:
    """To go through its data."""
    return _minutes(sum(_bytes(path) for path in _data(run_name)))


def convert_minutes(model_name: str) -> int:
    """By the source's own bytes where they are more, or its sizes are not known."""
    path = model(model_name).source
    source = Path(fetched(model_name) if path.startswith(HUB) else path)
    return max(model_minutes(model_name), _minutes(_bytes(source)))


def model_minutes(model_name: str) -> int:
    """To go through a model that may be stored in fp32."""
    return _minutes(4 * _parameters(model_name))


def export_minutes(run_name: str) -> int:
    """As the model that it started from."""
    return model_minutes(run(run_name).model)


def tokenize_minutes(corpus_name: str) -> int:
    """Of one of the jobs that share the corpus."""
    share = _corpus_bytes(corpus_name) / corpus(corpus_name).parts
    return START + math.ceil(share / MB / TEXT_A_MINUTE / WORKERS)


def merge_minutes(corpus_name: str) -> int:
    """As if tokens were as many bytes as the corpus's files."""
    return _minutes(_corpus_bytes(corpus_name))


def retried(minutes: int, attempt: int) -> int:
    """As many more with each attempt, up to a day: the one before may have met its time limit."""
    return max(minutes, min(attempt * minutes, DAY))


def _test_tokens(run_name: str) -> int:
    """As if the test documents were as long as the others, and a token took two bytes."""
    found = run(run_name)
    share = 1.0 if found.test else found.split[2] / sum(found.split)
    names = found.test or found.data
    return round(share * sum(_bytes(Path(dataset(run_name, name) + ".bin")) for name in names) / 2)


def _minutes(num_bytes: int) -> int:
    return START + math.ceil(num_bytes / MB / WEIGHTS_A_MINUTE)


def _mb(num_bytes: float) -> int:
    return math.ceil(num_bytes / MB)


def _bytes(path: Path) -> int:
    """Of a file, or of all in a directory; 0 if it is not there yet."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _data(run_name: str) -> list[Path]:
    return [Path(file) for file in dataset_files(run_name)]


def _corpus_bytes(corpus_name: str) -> int:
    return sum(_bytes(path) for name in corpus(corpus_name).files for path in matching(Path(name)))


def _parameters(model_name: str) -> int:
    shape = _shape(model_name)
    return FAMILIES[shape.family].num_parameters(shape) if shape else 0


def _shape(model_name: str) -> Shape | None:
    """The row that the model's file names, else what its checkpoint says; None where there is neither."""
    if name := model(model_name).shape:
        return named_size(name)
    config = Path(f"results/models/{model_name}/checkpoint/config.json")
    try:
        return from_hf_config(read_json(config, ""))
    except UserError:  # not made yet, or damaged, which the stages tell
        return None


def _largest_block(shape: Shape) -> int:
    """Elements of the largest layer, or of the embedding or the head where they are more."""
    sizes: Counter[int | str] = Counter()
    for key, tensor in FAMILIES[shape.family].keys(shape).items():
        layer = layer_of(key)
        sizes[key if layer is None else layer] += math.prod(tensor.shape(shape))
    return max(sizes.values())

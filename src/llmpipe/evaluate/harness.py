"""lm-eval's side of an evaluation: our engine as a model of its, its tasks run, its results as measures."""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from llmpipe.config import PERPLEXITY
from llmpipe.data.tokenizer import Tokenizer
from llmpipe.errors import UserError, nearest
from llmpipe.evaluate.plan import TASK_FILES
from llmpipe.evaluate.table import Measure
from llmpipe.inference.generate import greedy
from llmpipe.inference.loglikelihood import HasLogits, loglikelihoods

MAX_NEW_TOKENS = 256
FEWSHOT_SEED = 1234  # lm-eval's own
log = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """An engine and its tokenizer, as lm-eval asks for a model; its numbers are those of lm-eval's HFLM."""

    def __init__(self, engine: HasLogits, tokenizer: Tokenizer, window: int):
        super().__init__()
        self.engine, self.text, self.window = engine, tokenizer, window

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        return self.text.bos_id if self.text.bos_id >= 0 else self.text.eos_id

    @property
    def max_length(self) -> int:
        return self.window

    @property
    def tokenizer_name(self) -> str:
        return self.text.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text is text: `<s>` in it is no control token. BOS comes first if the tokenizer's config says so."""
        bos = self.text.add_bos if add_special_tokens is None else add_special_tokens
        return [*([self.text.bos_id] if bos else []), *self.text.encode(string)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is `loglikelihoods`'s

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [(score.logprob, score.greedy) for score in loglikelihoods(self.engine, pairs, self.window)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs = [([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
        return [score.logprob for score in loglikelihoods(self.engine, pairs, self.window)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.arguments) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """Greedy text after a context, cut before the first stop string."""
        if settings.get("do_sample") or settings.get("temperature"):
            raise UserError("a task asks for sampled text: this version of llmpipe generates greedily only")
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        room = int(settings.get("max_gen_toks", min(MAX_NEW_TOKENS, self.window // 2)))
        if room >= self.window:
            raise UserError(
                f"a task asks for {room} new tokens, but the model reads {self.window} in all: lower its max_gen_toks"
            )
        prompt = self.tok_encode(context)[-(self.window - room) :]

        def ended(tokens: list[int]) -> bool:
            return tokens[-1] == self.text.eos_id or any(stop in self.text.decode(tokens) for stop in stops)

        (tokens,) = greedy(self.engine, [prompt], room, self.window, ended)
        text = self.text.decode(tokens)
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def run_tasks(model: HarnessModel, tasks: list[str]) -> list[Measure]:
    """Run lm-eval's tasks, by its names or from files of ours, and return what was measured."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not all(map(is_file, tasks)))  # its own tasks take seconds to list
    for task in tasks:
        if not is_file(task) and task not in manager.all_tasks:
            raise UserError(f"lm-eval knows no task {task!r}: {nearest(task, [PERPLEXITY, *manager.all_tasks])}")
    with tempfile.TemporaryDirectory() as cache, quiet():
        try:
            loaded = manager.load([local_task(Path(task), cache) if is_file(task) else task for task in tasks])
            for task in loaded["tasks"].values():
                task.set_config("num_fewshot", task.get_config("num_fewshot") or 0)
                task.set_fewshot_seed(FEWSHOT_SEED)
            results = evaluate(model, loaded, log_samples=False)
        except UserError:
            raise
        except Exception as error:  # lm-eval and datasets raise what they like
            log.debug("lm-eval failed", exc_info=True)
            raise UserError(f"lm-eval failed in {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    return measures(dict(results)) if results else []


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' chatter, and without bars where no terminal shows them; our log has its own."""
    import datasets

    datasets.disable_progress_bars()
    for chatty in ("lm_eval", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if sys.stderr.isatty():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # noqa: PTH123
        yield


def is_file(task: str) -> bool:
    return task.endswith(TASK_FILES)


def local_task(path: Path, cache: str) -> dict[str, Any]:
    """A task's file; its data set is prepared in `cache`, not in the user's home."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "cache_dir": cache}
    return config


def num_samples(results: dict[str, Any], task: str) -> int:
    """The documents of a task, or of a group's tasks."""
    own = results["n-samples"].get(task)
    return (
        own["effective"] if own else sum(num_samples(results, part) for part in results["group_subtasks"].get(task, []))
    )


def measures(results: dict[str, Any]) -> list[Measure]:
    """lm-eval's results, a measure for each metric; names lose the filter `none`."""
    found = []
    for task, values in results["results"].items():
        n = num_samples(results, task)
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if not isinstance(value, float | int) or name.endswith("_stderr") or not chosen:
                continue
            stderr = values.get(f"{name}_stderr,{chosen}")
            error = float(stderr) if isinstance(stderr, float | int) else None
            found.append(Measure(task, name if chosen == "none" else f"{name} ({chosen})", float(value), error, n))
    return found

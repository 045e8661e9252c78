"""Where the stages of a project's models and runs put what they make: the paths below results/."""

from llmpipe.project.configs import corpus, layout, run

DATASET = (".bin", ".idx", ".manifest.json")
ROLES = (".roles.bin", ".roles.idx")
"""What a corpus of chats, or of tokens with labels, has besides."""


def fetched(name: str) -> str:
    """Where the weights of a model with an hf:// source are fetched to."""
    return f"results/models/{name}/source"


def dataset(run_name: str, corpus_name: str) -> str:
    """The prefix of one of a run's datasets: tokens are made with the run's model's tokenizer."""
    return f"results/models/{run(run_name).model}/corpora/{corpus_name}"


def part_prefixes(model_name: str, corpus_name: str) -> list[str]:
    """The datasets that a corpus's jobs make."""
    count = corpus(corpus_name).parts
    prefix = f"results/models/{model_name}/corpora/{corpus_name}"
    return [f"{prefix}.part-{number}-of-{count}" for number in range(1, count + 1)]


def part_files(model_name: str, corpus_name: str) -> list[str]:
    """The files of these datasets."""
    suffixes = _suffixes(corpus_name)
    return [prefix + suffix for prefix in part_prefixes(model_name, corpus_name) for suffix in suffixes]


def dataset_files(run_name: str) -> list[str]:
    """The files of a run's datasets."""
    names = run(run_name).corpora
    return [dataset(run_name, name) + suffix for name in names for suffix in _suffixes(name)]


def _suffixes(corpus_name: str) -> tuple[str, ...]:
    return DATASET + ROLES if corpus(corpus_name).has_roles else DATASET


def checkpoint(run_name: str) -> str:
    """The checkpoint that a run starts from."""
    return f"results/models/{run(run_name).model}/checkpoint"


def rank_files(run_name: str) -> str:
    """The rank files of a run's model in the run's layout."""
    return f"results/models/{run(run_name).model}/{layout(run_name).rank_files}"


def cards(run_name: str) -> list[str]:
    """The verification cards that a run waits for: the checkpoint's and the rank files'."""
    return [f"results/models/{run(run_name).model}/verify.json", f"{rank_files(run_name)}.verify.json"]


def tracked_files(name: str, stage: str) -> list[str]:
    """What has to be there before `llmpipe track` mirrors a stage of a run or of a model."""
    run_folder, model_folder = f"results/runs/{name}", f"results/models/{name}"
    return {
        "convert": [f"{model_folder}/checkpoint"],
        "verify": [f"{model_folder}/verify.json"],
        "evaluate": [f"{run_folder}/tracked/finetune.json", f"{run_folder}/evaluate/table.json"],
        "export": [f"{run_folder}/tracked/evaluate.json", f"{run_folder}/export"],
    }[stage]

"""Where a checkpoint's tokenizer lies, in which files, and what those say of themselves."""

from pathlib import Path

from llmpipe.checkpoint import carried
from llmpipe.checkpoint.sentencepiece_model import load
from llmpipe.data.tokenizers.ranks import SPECIAL, is_tiktoken, read_ranks
from llmpipe.data.tokenizers.tekken import open_tekken

MODEL, TEKKEN, JSON = "tokenizer.model", "tekken.json", "tokenizer.json"
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
FILES = (
    MODEL, JSON, CONFIG, "special_tokens_map.json", ADDED, "vocab.json", "merges.txt",
    "chat_template.jinja", TEKKEN,
)  # fmt: skip


def folder(path: Path) -> Path | None:
    """The directory with a source's tokenizer; Meta's, Megatron's and EasyLM's weights may have it one folder above."""
    above = [] if (path / "config.json").is_file() else [path.absolute().parent]
    return next((place for place in (path, *above) if holds(place)), None)


def holds(place: Path) -> bool:
    """Whether a tokenizer lies in a directory."""
    return any((place / name).is_file() for name in (MODEL, TEKKEN, JSON))


def file_at(place: Path) -> Path:
    """The file of a directory that says its tokens: tokenizer.json first, which has the added ones, too."""
    return next(place / name for name in (JSON, MODEL, TEKKEN) if (place / name).is_file())


def names(place: Path) -> list[str]:
    """The files of a directory that belong to its tokenizer, chat templates too."""
    return [
        name for name in carried.names(place) if name in FILES or name.startswith(("chat_template", carried.TEMPLATES))
    ]


def find(path: Path) -> Path | None:
    """The tokenizer.model or tekken.json of a source."""
    place = folder(path)
    return own_file(place) if place else None


def own_file(place: Path) -> Path | None:
    """The file of a folder that transformers does not read, and that is the truth beside a tokenizer.json."""
    return next((place / name for name in (MODEL, TEKKEN) if (place / name).is_file()), None)


def model_size(model: Path) -> int:
    """How many tokens a tokenizer.model or tekken.json has."""
    if model.name == TEKKEN:
        return open_tekken(model).vocab_size
    if is_tiktoken(model):
        return len(read_ranks(model)) + SPECIAL
    return load(model).vocab_size()


def control_ids(path: Path) -> tuple[int | None, int | None]:
    """The ids of BOS and EOS that a source's tokenizer.model or tekken.json says; None where it has none."""
    model = find(path)
    if model is None:
        return None, None
    if model.name == TEKKEN:
        return open_tekken(model).bos_id, open_tekken(model).eos_id
    if is_tiktoken(model):
        bos = model_size(model) - SPECIAL
        return bos, bos + 1
    tokenizer = load(model)
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return (bos if bos >= 0 else None), (eos if eos >= 0 else None)

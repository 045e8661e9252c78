"""The config files: each a frozen dataclass, which is its schema; `llmpipe.yaml_file` reads them."""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from llmpipe.errors import UserError
from llmpipe.layout import Layout

T = TypeVar("T")
HUB = "hf://"
PERPLEXITY = "perplexity"
"""Among an evaluation's tasks, the one that is not lm-eval's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """config/models/NAME.yaml: what weights."""

    source: str
    """The weights as they came: a directory of Hugging Face's, Meta's (consolidated.*.pth, params.json), any Megatron's
    or EasyLM's, or hf://ORG/NAME@REV, which is fetched to results/models/NAME/source."""
    shape: str | None = None
    """A row of the family's size table: used where the source has no config, else checked against it."""
    dialect: str | None = None
    """The fork of a Megatron directory (mcore, legacy, epf, epf-old, ali, mfz), where its files leave it in doubt."""
    vocab: int | None = None
    """The true rows of a Megatron directory's padded vocabulary, where its files do not say them."""
    added_tokens: list[str] = field(default_factory=list)
    """Tokens that convert adds to the vocabulary, as ["<|im_start|>", "<|im_end|>"]; those that are there stay."""
    new_rows: Literal["mean", "zeros"] = "mean"
    """What their rows in embedding and head hold: the mean of the old rows, or zeros."""

    def __post_init__(self) -> None:
        if self.source.startswith(HUB):
            parse_hub(self.source)
        if empty := [token for token in self.added_tokens if not token.strip()]:
            raise UserError(f"added_tokens holds {empty[0]!r}: name tokens as <|im_start|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """config/corpora/NAME.yaml: what text."""

    files: list[str]
    """Files or directories of .jsonl, .json, .txt (also .gz, .zst), .parquet or .arrow, from the project's folder; a
    name may have * in it."""
    kind: Literal["text", "chat", "tokens"] = "text"
    """text: documents for continued pretraining. chat: conversations, of which the assistant's turns are trained.
    tokens: rows of input_ids, with or without labels (-100: no loss)."""
    text_key: str | list[str] = "text"
    """The key that holds a row's document, as text or meta.text; of several, as [title, text], the texts are joined."""
    separator: str = "\n\n"
    """What stands between the texts of several keys."""
    bos: bool | None = None
    """Start each document with BOS; left out, the tokenizer's own rule (add_bos_token)."""
    append_eod: bool = True
    """End each document with EOS."""
    fields: dict[str, str] | str = field(default_factory=dict)
    """chat: the keys of a row's texts, as {user: question, assistant: answer, system: rules}, or of a list of turns, as
    {messages: dialog, role: speaker, content: text}; left out, rows are of a known kind. Or EasyLM's grammar, as
    "[question+prompt],answer"."""
    labels: bool | None = None
    """tokens: rows have labels, so that the dataset has roles, which the workflow then knows of; left out, the first
    row tells."""
    template: str | None = None
    """chat: how conversations are written down: chatml, chatml_openai, llama2, llama3, mistral, plain; left out, by the
    tokenizer's own template."""
    max_length: int | None = None
    """chat: the most tokens that a conversation may have; a recipe's seq_len, so that each fits into a sequence."""
    over_long: Literal["split", "drop"] = "split"
    """chat: conversations with more are split between turns, and what still has more is left out; or left out whole."""
    skip_bad: int = 0
    """Leave out as many bad rows, and list them in the dataset's .rejects.jsonl; one more stops."""
    parts: int = 1
    """Tokenize the corpus in so many jobs, and join what they make: the same bytes, sooner on a cluster."""

    def __post_init__(self) -> None:
        if not self.text_key:
            raise UserError("text_key is empty, but has to name a key, or several as in [title, text]")
        if self.skip_bad < 0:
            raise UserError(f"skip_bad is {self.skip_bad}, but has to be 0 or more")
        for name in ("fields", "template", "max_length"):
            if getattr(self, name) and self.kind != "chat":
                raise UserError(f"{name} is for chats, and this corpus has kind: {self.kind}; say kind: chat")
        if self.labels is not None and self.kind != "tokens":
            raise UserError(f"labels is for rows of tokens, and this corpus has kind: {self.kind}; say kind: tokens")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}, but has to be 2 or more")
        if self.parts < 1:
            raise UserError(f"parts is {self.parts}, but has to be 1 or more")

    @property
    def has_roles(self) -> bool:
        """Whether its dataset has a file of roles, as far as is said here."""
        return self.kind == "chat" or bool(self.labels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """config/runs/NAME.yaml: which model with which data and recipe, and where."""

    model: str
    """A name in config/models."""
    data: dict[str, float]
    """Names in config/corpora, each with its weight in the blend."""
    recipe: str
    """A name in config/recipes."""
    split: list[float] = field(default_factory=lambda: [969, 30, 1])
    """Shares of the documents for train, validation, test; not used where one of the next two is given."""
    validation: dict[str, float] = field(default_factory=dict)
    """Corpora of their own for validation, as in data; then every document of data is trained on."""
    test: dict[str, float] = field(default_factory=dict)
    """Corpora of their own to measure perplexity on; then every document of data is trained on."""
    layout: Layout = field(default_factory=Layout)
    evaluate: list[str] = field(default_factory=lambda: [PERPLEXITY])
    """perplexity (of the test split), lm-eval task names, or files of lm-eval tasks."""

    def __post_init__(self) -> None:
        check_held_out(self.data, self.validation, self.test)
        check_split(self.split, f"split: {self.split}")

    @property
    def corpora(self) -> list[str]:
        """All that it reads, each once."""
        return list(self.data | self.validation | self.test)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracking:
    """Where `llmpipe track` mirrors the runs."""

    uri: str = "sqlite:///mlflow.db"
    """MLflow's tracking URI; a sqlite path counts from the project's folder."""
    experiment: str = "llmpipe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """config/config.yaml: which runs a bare `snakemake` builds, and where they are tracked."""

    runs: list[str]
    """Names in config/runs."""
    tracking: Tracking = field(default_factory=Tracking)


def parse_hub(given: str) -> tuple[str, str | None]:
    """`hf://ORG/NAME[@REV]` as the repository's name and the revision: a branch, a tag, a commit, or None."""
    match = re.fullmatch(HUB + r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", given)
    if not match:
        raise UserError(f"{given} names no repository of the Hugging Face hub: hf://ORG/NAME or hf://ORG/NAME@REV does")
    return match[1], match[2]


def parse_data(given: tuple[str, ...], option: str = "--data") -> dict[str, float]:
    """`PREFIX[=WEIGHT]` options as a mapping from prefix to weight."""
    data: dict[str, float] = {}
    for item in given:
        prefix, _, weight = item.partition("=")
        if prefix in data:
            raise UserError(f"{option} {item}: {prefix} is given twice; give it once, with the sum of the weights")
        try:
            data[prefix] = float(weight or 1.0)
        except ValueError:
            raise UserError(f"{option} {item}: the weight {weight!r} has to be a number, as in PREFIX=0.5") from None
        if not 0 < data[prefix] < math.inf:
            raise UserError(f"{option} {item}: the weight has to be above 0")
    return data


def check_held_out(data: Collection[str], validation: Collection[str], test: Collection[str]) -> None:
    """UserError for a corpus or dataset that is trained on and held out too."""
    for name in (*validation, *test):
        if name in data:
            raise UserError(f"{name} is held out, for validation or test, and trained on as well: take it out of one")


def parse_split(given: str) -> list[float]:
    """`969,30,1` as three shares."""
    try:
        shares = [float(share) for share in given.split(",")]
    except ValueError:
        shares = []
    check_split(shares, f"--split {given}")
    return shares


def check_split(shares: list[float], given: str) -> None:
    """UserError unless these are three shares of something."""
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        raise UserError(f"{given}: three shares for train, validation and test are expected, as in 969,30,1")

"""The gate before a model is published: the export read back, against the weights that it was made from.

- copies: ranks that hold the same slice of a tensor hold the same bytes
- read back by llmpipe's own reader, every tensor is that of the weights, bit for bit
- read in the format's own names by the plain reader of `verify`, which knows none of the tables that wrote it, every
  row is there once
- the format's plain forward (transformers' own layers for Hugging Face) gives the logits of our decoder
- the tokenizer is the weights' own

One block of each side is in memory at a time, whatever the model's size.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from llmpipe.checkpoint.diff import compare
from llmpipe.checkpoint.formats import NOTHING, Told, detect, open_source
from llmpipe.checkpoint.rank_files import RankFilesSource, layout
from llmpipe.checkpoint.source import Slices, TensorSource
from llmpipe.errors import UserError
from llmpipe.progress import progress
from llmpipe.verify.card import Check, Findings, at_most
from llmpipe.verify.compare import numeric_checks, probe, stream
from llmpipe.verify.gate import Reference, open_reference, padding_checks
from llmpipe.verify.hf import HfSettings
from llmpipe.verify.inventory import hyper_parameter_checks, inventory_checks
from llmpipe.verify.ours import OurModel
from llmpipe.verify.tokenizer import tokenizer_checks


class Cast:
    """Weights in the type that they are exported in."""

    def __init__(self, source: TensorSource, dtype: torch.dtype):
        self.path, self.shape, self.source, self.to = source.path, source.shape, source, dtype
        self.tokenizer_place = source.tokenizer_place

    def keys(self) -> list[str]:
        """The source's."""
        return self.source.keys()

    def dtype(self, key: str) -> torch.dtype:
        """That of the export."""
        return self.to

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        """A tensor, or a part of one, rounded."""
        return self.source.read(key, slices).to(self.to)

    def blocks(self, key: str) -> None:
        """Nowhere in a file as they are."""


class Trained(OurModel):
    """The weights that are exported: our decoder on them, and their tensors by our names."""

    def __init__(self, weights: Path, dtype: torch.dtype | None):
        """`dtype`: what the export rounds them to."""
        super().__init__(weights)
        if dtype is not None:
            self.source = Cast(self.source, dtype)
        self.settings = HfSettings(weights) if (weights / "config.json").is_file() else open_reference(weights)

    def names(self) -> list[str]:
        """Every tensor."""
        return self.source.keys()

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type in the export."""
        return self.source.dtype(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.source.read(name)

    def hyper_parameters(self) -> dict[str, float | str]:
        """What shapes the arithmetic, as the weights' own files say it."""
        return {"head size": self.shape.head_dim} | self.settings.hyper_parameters()

    @property
    def longest_text(self) -> int:
        """How many positions the model is made for, with rope scaling."""
        return self.settings.longest_text if isinstance(self.settings, HfSettings) else self.shape.max_positions


def check_round_trip(weights: Path, directory: Path, dtype: torch.dtype | None = None) -> list[Check]:
    """The rows of the comparison; UserError, naming what differs first, if one of them fails.

    `dtype`: what the export rounds the weights to; None: nothing is rounded.
    """
    try:
        findings = _findings(weights, directory, dtype)
    except (UserError, RuntimeError) as error:  # torch's: a tensor does not fit the settings
        raise UserError(
            f"the round trip differs: the export is not read back: {error}; nothing was exported"
        ) from error
    checks = [check for found, _ in findings for check in found]
    first = next((where for _, where in findings if where), None)
    failed = [_told(check) for check in checks if check.verdict == "fail"]
    if failed:
        raise UserError(
            f"the round trip differs: the export read back is not {weights}, first at {first or failed[0]}; nothing was"
            f" exported. Failed: {'; '.join(failed)}"
        )
    return checks


def _told(check: Check) -> str:
    """What failed: a count with what was found, or a number with its limit."""
    if not check.limit or check.value is None:
        return f"{check.name}: {check.detail}"
    return f"{check.name} {check.value:.3g} (limit {check.limit:g})"


def _findings(weights: Path, directory: Path, dtype: torch.dtype | None) -> list[Findings]:
    """Every check, in the order of what they tell."""
    trained = Trained(weights, dtype)
    exported = open_reference(directory, None, trained.hyper_parameters())
    return [
        copy_checks(weights),
        read_back_checks(trained.source, directory),
        inventory_checks(trained, exported),
        hyper_parameter_checks(trained, exported),
        (padding_checks(exported), None),
        tokenizer_checks(directory, weights, trained.shape.vocab),
        forward_checks(trained, exported),
    ]


def copy_checks(weights: Path) -> Findings:
    """Norms, shared KV heads and a tied embedding are in several rank files: all have to have been trained alike."""
    source = open_source(weights)
    if not isinstance(source, RankFilesSource):
        return [], None
    first: dict[str, Path] = {}
    different, compared = [], 0
    for name, tensors in layout(source.shape, source.tp, source.stages).items():
        for one in tensors:
            region = f"{one.name} {[(part.rows, part.cols) for part in one.parts]}"
            path = first.setdefault(region, weights / name)
            if path.name != name:
                compared += 1
                different += [] if _same(path, weights / name, one.name) else [f"{one.name} in {name} and {path.name}"]
    detail = "; ".join(different[:4]) or f"{compared} tensors of other ranks' files are their copies, bit for bit"
    return [at_most("copies that differ", len(different), 0, detail)], next(iter(different), None)


def _same(one: Path, other: Path, key: str) -> bool:
    with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
        return torch.equal(a.get_tensor(key).view(torch.uint8), b.get_tensor(key).view(torch.uint8))


def read_back_checks(source: TensorSource, directory: Path) -> Findings:
    """Every tensor, a few rows at a time, in the type that it was to have."""
    told = Told(source.shape) if detect(directory) == "megatron" else NOTHING  # what its args cannot say, or never do
    exported, keys = open_source(directory, told), source.keys()
    different = []
    with progress("compare", len(keys), "tensors") as shown:
        for key in keys:
            found = compare(source, exported, key)
            if found.verdict != "equal" or found.dtypes[0] != found.dtypes[1]:
                different.append(key)
            shown.add(1, key)
    detail = ", ".join(different[:4]) or f"{len(keys)} tensors, bit for bit"
    return [at_most("tensors that differ", len(different), 0, detail)], next(iter(different), None)


def forward_checks(trained: Trained, exported: Reference) -> Findings:
    """Our decoder's logits on the weights, the format's own forward on the export."""
    tokens, positions = probe(trained.shape.vocab, trained.longest_text)
    trace = stream(trained, exported, tokens, positions)
    checks = [check for check in numeric_checks(trace, tokens) if check.limit is not None or check.verdict == "fail"]
    return checks, trace.first_difference

"""Which files of a repository on the hub a model needs: weights in one format, and what goes along with them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from llmpipe.checkpoint.carried import goes_along
from llmpipe.checkpoint.hub import Repository, fetch
from llmpipe.config import HUB
from llmpipe.errors import UserError
from llmpipe.files import read_json

FORMATS = ("safetensors", "bin", "meta")
"""Of weights, in the order of preference."""


def choose(repository: Repository, weights: str | None = None, include: Sequence[str] = ()) -> dict[str, str]:
    """What to fetch: from the path below the output to the name in the repository."""
    found = {kind: names for kind in FORMATS if (names := _weights(repository, kind))}
    kind = weights or next(iter(found), None)
    if kind not in found and (weights or not include):
        raise UserError(_no_weights(repository, weights, list(found)))
    along = [name for name in repository.files if goes_along(name)]
    if kind in ("safetensors", "bin") and "config.json" in repository.files:
        along.append("config.json")
    wanted = {name: name for name in [*along, *_included(repository, include)]}
    # Meta's files of a repository that has both stand in original/
    return wanted | {name.removeprefix("original/"): name for name in found.get(kind or "", [])}


def _weights(repository: Repository, kind: str) -> list[str]:
    """The files of one format of weights, empty if there is none."""
    if kind == "meta":
        return _meta_weights(repository)
    return _hf_weights(repository, "model.safetensors" if kind == "safetensors" else "pytorch_model.bin")


def _hf_weights(repository: Repository, single: str) -> list[str]:
    """One file, or an index and the files that it names; an index counts first, as everywhere."""
    index = f"{single}.index.json"
    if index not in repository.files:
        return [single] if single in repository.files else []
    table = read_json(fetch(repository, index), "the repository is damaged, take another revision")
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        raise UserError(f"{HUB}{repository.name}: {index} has no weight_map: take another revision")
    named = sorted({str(name) for name in table["weight_map"].values()})
    missing = [name for name in named if name not in repository.files]
    if missing:
        raise UserError(f"{HUB}{repository.name}: {index} names {', '.join(missing)}, and the repository has none such")
    return [index, *named]


def _meta_weights(repository: Repository) -> list[str]:
    """consolidated.*.pth (Mistral: or .safetensors), params.json and tokenizer.model, at the top or in original/."""
    for folder in ("", "original/"):
        pattern = rf"{folder}consolidated\.(\d+\.pth|safetensors)"
        found = [name for name in repository.files if re.fullmatch(pattern, name)]
        shards = [name for name in found if name.endswith(".safetensors")] or found
        beside = [f"{folder}{name}" for name in ("params.json", "tokenizer.model")]
        if shards and beside[0] in repository.files:
            return [*shards, *(name for name in beside if name in repository.files)]
    return []


def _no_weights(repository: Repository, asked: str | None, there: list[str]) -> str:
    names = sorted(repository.files)
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    if there:
        return f"{HUB}{repository.name} has no weights of format {asked}, but {', '.join(there)}"
    return (
        f"{HUB}{repository.name} has no weights that llmpipe knows: {listed or 'nothing'} found; expected"
        " model.safetensors, pytorch_model.bin, or Meta's or Mistral's consolidated.* with params.json."
        " --include PATTERN fetches other files"
    )


def _included(repository: Repository, patterns: Sequence[str]) -> list[str]:
    found = []
    for pattern in patterns:
        names = [name for name in repository.files if fnmatchcase(name, pattern)]
        if not names:
            raise UserError(f"--include {pattern}: {HUB}{repository.name} has no such file")
        for name in names:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UserError(f"{HUB}{repository.name} has a file {name!r}, which would lie outside of the output")
        found += names
    return found

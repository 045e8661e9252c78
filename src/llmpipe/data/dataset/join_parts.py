"""The parts of one corpus, told by their manifests, in order; and the manifest that the corpus has as a whole."""

import shutil
from pathlib import Path
from typing import Any

from llmpipe.data.dataset.manifest import rejects_path
from llmpipe.errors import UserError
from llmpipe.files import atomic_file

COUNTS = ("documents", "empty_documents", "rejected_rows", "split_chats", "dropped_chats", "tokens")
Facts = dict[str, Any]


def joined_parts(sources: list[Path], manifests: list[Facts | None]) -> tuple[list[Path], Facts]:
    """The parts in their order, and the facts of all; UserError if they are not all parts of one corpus, once each."""
    parts: dict[int, tuple[Path, Facts]] = {}
    for source, facts in zip(sources, manifests, strict=True):
        if not facts or "part" not in facts:
            raise UserError(f"{source} is no part of a corpus, as others here are: join the parts first, apart from it")
        number = facts["part"]["number"]
        if number in parts:
            raise UserError(f"{source} and {parts[number][0]} are both part {number}: name each part once")
        parts[number] = source, facts
    _check_complete(parts)
    ordered = [parts[number] for number in sorted(parts)]
    every = [facts for _, facts in ordered]
    _check_counts(every)
    return [source for source, _ in ordered], {**rules(every[0]), **counts(every), "sources": _sources(every)}


def _check_complete(parts: dict[int, tuple[Path, Facts]]) -> None:
    first_path, first = next(iter(parts.values()))
    for path, facts in parts.values():
        if facts["part"]["count"] != first["part"]["count"] or facts["part"]["corpus"] != first["part"]["corpus"]:
            raise UserError(
                f"{path} and {first_path} are no parts of one corpus: other files, another tokenizer, other options or"
                " another number of parts; tokenize all parts again with the same"
            )
    count = first["part"]["count"]
    if missing := [str(number) for number in range(1, count + 1) if number not in parts]:
        raise UserError(f"of the {count} parts of the corpus these are missing: {', '.join(missing)}")


def _check_counts(every: list[Facts]) -> None:
    """UserError where tokenizing the whole corpus would have stopped."""
    found, allowed = counts(every), every[0]["part"]["skip_bad"]
    if found["rejected_rows"] > allowed:
        raise UserError(f"the parts have {found['rejected_rows']} bad rows, and --skip-bad lets {allowed} pass")
    if not found["documents"]:
        raise UserError("the corpus is empty: no part has a document with text")


def rules(facts: Facts) -> Facts:
    """What a manifest says of how a dataset was made, but not of what."""
    apart = {"llmpipe", "kind", "part", "sources", "files", *COUNTS}
    return {key: value for key, value in facts.items() if key not in apart}


def counts(every: list[Facts]) -> Facts:
    """The sums of what is counted."""
    return {key: sum(facts.get(key, 0) for facts in every) for key in COUNTS}


def _sources(every: list[Facts]) -> list[Facts]:
    """The files of the corpus, each once; its part with the beginning knows its hash."""
    spans = [source for facts in every for source in facts["sources"]]
    return [{key: span[key] for key in ("path", "bytes", "sha256")} for span in spans if span["start"] == 0]


def join_rejects(sources: list[Path], output: Path) -> None:
    """One list of the bad rows that were left out, if any were."""
    found = [path for source in sources if (path := rejects_path(source)).is_file()]
    if found:
        with atomic_file(rejects_path(output)) as file:
            for path in found:
                with path.open("rb") as rejects:
                    shutil.copyfileobj(rejects, file)

"""The gate: run every check that a directory calls for, write the card, fail loudly."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.verify.card import Check, Findings, at_most, default_output, make_card, write_card
from llmpipe.verify.changed import Cut, CutRunner, new_row_check
from llmpipe.verify.compare import LOGIT_LIMIT, Side, numeric_checks, probe, stream
from llmpipe.verify.easylm import EasyLMModel, holds_weights
from llmpipe.verify.hf import HfModel
from llmpipe.verify.hf_files import holds_a_model
from llmpipe.verify.inventory import hyper_parameter_checks, inventory_checks, rounded_to, storage_types
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.megatron_files import is_megatron
from llmpipe.verify.merged import Adapter
from llmpipe.verify.merged_models import Merged, MergedEasyLM, MergedHf, MergedMegatron, MergedMeta
from llmpipe.verify.meta import MetaModel
from llmpipe.verify.ours import OurModel
from llmpipe.verify.rank_files import is_rank_files, rank_file_checks
from llmpipe.verify.round_trip import round_trip_checks
from llmpipe.verify.stored_bytes import Reference
from llmpipe.verify.tokenizer import source_tokenizer, tokenizer_checks
from llmpipe.verify.told import old_permutation, said

log = logging.getLogger(__name__)


class _Models(NamedTuple):
    """What opens each format."""

    meta: Callable[..., MetaModel]
    megatron: Callable[..., MegatronModel]
    easylm: Callable[..., EasyLMModel]
    hf: Callable[..., HfModel]


_PLAIN = _Models(MetaModel, MegatronModel, EasyLMModel, HfModel)
# Where no side says how long texts may be: Llama 2's.
LONGEST = 4096


def verify(subject: Path, reference: Path, output: Path | None = None, adapter: Path | None = None) -> dict[str, Any]:
    """Compare a checkpoint with its source, or rank files with their checkpoint; write the card; UserError if it fails.

    `adapter`: where the one that was merged lies now. The error names the first layer or tensor that differs, and the
    checks that failed.
    """
    output = output or default_output(subject)
    made = manifest.read(subject)
    checks, first = _intact(subject, reference)
    if not first:
        if is_rank_files(subject):
            checks, first = rank_file_checks(subject, reference)
        else:
            checks, first = checkpoint_checks(subject, reference, adapter)
    described = {"path": str(subject), "kind": made.kind, "digest": made.digest}
    card = make_card(described, _describe(reference), checks, first)
    path = write_card(card, output)
    if card["verdict"] == "fail":
        raise UserError(_failure(card, path))
    log.info("verify: %s passes %d checks against %s, see %s", subject, len(checks), reference, path.with_suffix(".md"))
    return card


def checkpoint_checks(subject: Path, reference: Path, adapter: Path | None = None) -> Findings:
    """Every check of weights in any format against their source, and the first difference: layer, tensor or setting."""
    if subject.resolve() == reference.resolve():
        raise UserError(f"--reference {reference} is the subject itself: name the weights that it was made from")
    made_from = _made_from(subject, adapter)
    whole, source = _open_both(subject, reference, made_from)
    candidate, grown = _before_growth(whole, source, made_from)
    assumed = candidate.hyper_parameters()
    if dtype := rounded_to(source, candidate):
        source = _merged_as(whole, open_reference(reference, dtype, assumed, made_from))
    inventory, tensor = _inventory(source, candidate)
    trip, lost = round_trip_checks(subject, source, made_from)
    hyper, parameter = hyper_parameter_checks(source, candidate)
    rows, resized_by = int(float(whole.hyper_parameters()["vocabulary"])), _resizing(source, assumed, made_from)
    tokenizer, text = tokenizer_checks(subject, reference, rows, resized_by)
    numeric, layer = _forward(candidate, source, subject)
    checks = [*numeric, *inventory, *trip, *hyper, *grown, *padding_checks(candidate), *tokenizer]
    failed = [f"{check.name}: {check.detail}" for check in checks if check.verdict == "fail"]
    return checks, (layer or tensor or lost or parameter or text or failed[0]) if failed else None


def _made_from(subject: Path, adapter: Path | None) -> dict[str, Any]:
    """The manifest's source, an adapter where it lies now."""
    source = manifest.read(subject).source
    if adapter is None:
        return source
    if "adapter" not in source:
        raise UserError(f"--adapter {adapter}: {subject} was made without one: leave it out")
    return source | {"adapter": source["adapter"] | {"path": str(adapter)}}


def _inventory(source: Reference, candidate: Reference | Cut) -> Findings:
    """The bytes; copies that differ, or tensors that do not fit the settings, are a difference, too."""
    try:
        return inventory_checks(source, candidate, source.bounds if isinstance(source, Merged) else None)
    except (UserError, RuntimeError) as error:
        return [at_most("tensors without a partner", None, 0, str(error))], str(error)


def padding_checks(candidate: Reference | Cut) -> list[Check]:
    """The row of the card on padded rows, which Megatron takes into the softmax: nothing is in those just made."""
    if not isinstance(candidate, MegatronModel):
        return []
    found = candidate.trained_padding()
    detail = ", ".join(found) or "those beyond the vocabulary are zeros, or copies of the last true row"
    return [at_most("tables with other rows in their padding", len(found), 0, detail)]


def _before_growth(
    whole: Reference, source: Reference, made_from: dict[str, Any]
) -> tuple[Reference | Cut, list[Check]]:
    """A checkpoint that tokens were added to is compared without their rows; these have a check of their own."""
    if not made_from.get("added_tokens") or not isinstance(whole, HfModel):
        return whole, []
    rows = source.hyper_parameters().get("vocabulary")
    if rows is None:  # of the tokenizer, see `_before_tokens`
        assert isinstance(source, MegatronModel), source.path
        rows = source.vocab
    return Cut(whole, int(rows)), [new_row_check(whole, source, int(rows), made_from["new_rows"])]


def _open_both(subject: Path, reference: Path, made_from: dict[str, Any]) -> tuple[Reference, Reference]:
    """What the files of the one leave open, they take from the other; Hugging Face's leave nothing open."""
    if open_kind(reference) == HfModel.kind and open_kind(subject) != HfModel.kind:
        source = open_reference(reference, made_from=made_from)
        candidate = open_reference(subject, None, source.hyper_parameters())
        return candidate, _merged_as(candidate, source)
    candidate = open_reference(subject)
    assumed = candidate.hyper_parameters()
    if made_from.get("added_tokens") and is_megatron(reference):
        assumed = _before_tokens(assumed, reference, made_from)
    return candidate, _merged_as(candidate, open_reference(reference, None, assumed, made_from))


def _before_tokens(assumed: dict[str, float | str], reference: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """The candidate's settings, but for its grown vocabulary: the source's files say their own, or its tokenizer."""
    others = {name: value for name, value in assumed.items() if name != "vocabulary"}
    if "vocabulary" in open_reference(reference, None, others, made_from).hyper_parameters():
        return others
    own = source_tokenizer(reference)
    return others | ({"vocabulary": own.size} if own else {})


def _resizing(source: Reference, assumed: dict[str, float | str], made_from: dict[str, Any]) -> Path | None:
    """Where the merged adapter lies, if its embedding has other rows than the model had before."""
    rows = source.adapter.embedding_rows() if isinstance(source, Merged) else None
    if rows is None or not isinstance(source, Merged):
        return None
    plain = {key: value for key, value in made_from.items() if key != "adapter"}
    others = {name: value for name, value in assumed.items() if name != "vocabulary"}
    before = open_reference(source.path, None, others, plain).hyper_parameters().get("vocabulary")
    own = source_tokenizer(source.path) if before is None else None
    return source.adapter.path if rows != (own.size if own else before) else None


def _merged_as(candidate: Reference, source: Reference) -> Reference:
    """The source; its adapter is merged in the type that the candidate is of, if that is the wider."""
    types = storage_types(candidate)
    if isinstance(source, Merged) and len(types) == 1:
        source.adapter.written = next(iter(types))
    return source


def _forward(candidate: Reference | Cut, source: Reference, subject: Path) -> Findings:
    """Both forwards on the probe; transformers is not compared with itself: a source of its own meets our decoder."""
    known = (side.hyper_parameters().get("vocabulary") for side in (source, candidate))
    vocab = int(min(float(rows) for rows in known if rows is not None))
    tokens, positions = probe(vocab, _longest_text(candidate, source))
    try:
        runner: Side = candidate
        if isinstance(source, HfModel) and isinstance(candidate, HfModel):
            runner = OurModel(subject)
        elif isinstance(source, HfModel) and isinstance(candidate, Cut):
            runner = CutRunner(OurModel(subject), candidate.rows)
    except UserError as error:  # a tensor missing or left over
        return [at_most("largest logit difference", None, LOGIT_LIMIT, str(error))], None
    trace = stream(source, runner, tokens, positions)
    return numeric_checks(trace, tokens), trace.first_difference


def _longest_text(candidate: Reference | Cut, source: Reference) -> int:
    """How many positions the model is made for, those of its rope scaling too, as far as a side says it."""
    for side in (candidate, source):
        if isinstance(side, HfModel | Cut):
            return side.longest_text
    said = source.hyper_parameters() | candidate.hyper_parameters()
    positions = float(said.get("longest sequence", LONGEST))
    original = float(said.get("rope original_max_position_embeddings", positions))
    return int(max(positions, float(said.get("rope factor", 1)) * original))


def open_reference(
    path: Path,
    rounded_to: torch.dtype | None = None,
    assumed: dict[str, float | str] | None = None,
    made_from: dict[str, Any] | None = None,
) -> Reference:
    """The plain forward for a format's own convention; UserError if it is in none that has one.

    `assumed`: the other side's settings, for what a format's files do not say. `made_from`: the manifest's source of
    what was made of it, where the user's own word on it stands.
    """
    told, of = made_from or {}, _PLAIN
    if "adapter" in told:
        adapter = Adapter(Path(told["adapter"]["path"]), told["adapter"]["files"])
        meta, megatron = partial(MergedMeta, adapter), partial(MergedMegatron, adapter)
        of = _Models(meta, megatron, partial(MergedEasyLM, adapter), partial(MergedHf, adapter))
    if is_meta(path):
        return of.meta(path, rounded_to, assumed)
    if is_megatron(path):
        return of.megatron(path, rounded_to, said(told), assumed, old_permutation(told))
    if holds_weights(path):
        return of.easylm(path, rounded_to, said(told), assumed)
    if (path / "config.json").is_file():
        return of.hf(path, rounded_to)
    raise UserError(
        f"{path} is no reference: expected Hugging Face's config.json with *.safetensors, Meta's params.json with"
        " consolidated.*.pth, Megatron's mp_rank_* folders or EasyLM's streaming_params"
    )


def is_meta(path: Path) -> bool:
    """Whether Meta's files are the weights; Mistral's repositories hold such ones beside Hugging Face's."""
    return (path / "params.json").is_file() and not holds_a_model(path)


def open_kind(path: Path) -> str:
    """The format's name, for the card."""
    if is_meta(path):
        return MetaModel.kind
    if is_megatron(path):
        return MegatronModel.kind
    return EasyLMModel.kind if holds_weights(path) else HfModel.kind


def _intact(*directories: Path) -> Findings:
    """Whether the files are those of the manifests: a card speaks of digests. A foreign source has no manifest."""
    for directory in directories:
        if not manifest.has(directory):
            continue
        try:
            manifest.check(directory)
        except UserError as error:
            return [at_most("files unlike the manifest", 1, 0, str(error))], str(error)
    return [], None


def _describe(reference: Path) -> dict[str, Any]:
    finished = manifest.has(reference)
    kind = "rank files" if is_rank_files(reference) else open_kind(reference)
    return {"path": str(reference), "kind": kind, "digest": manifest.read(reference).digest if finished else None}


def _failure(card: dict[str, Any], path: Path) -> str:
    failed = ", ".join(_measured(check) for check in card["checks"] if check["verdict"] == "fail")
    return (
        f"{card['subject']['path']} differs from {card['reference']['path']}, first at {card['first_difference']}."
        f" Failed: {failed}. Nothing may be trained from it; the whole card is {path.with_suffix('.md')}"
    )


def _measured(check: dict[str, Any]) -> str:
    if check["value"] is None:
        return f"{check['name']} (not measured)"
    return check["name"] + ("" if check["limit"] is None else f" {check['value']:.3g} (limit {check['limit']:g})")

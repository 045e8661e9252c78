"""Plant one fault at a time in a correct conversion, sign it anew, and let `verify` say what it finds."""

import argparse
import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hf_faults
import rank_faults
import sentencepiece
import torch
from matrix_cells import FORMATS, RANKS
from matrix_models import make_model
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import convert, shard
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify

TOKENS = 509


@dataclass(frozen=True, slots=True)
class Route:
    """A correct conversion: of transformers' model through a format to the subject, beside its reference."""

    name: str
    model: str
    through: str | None = None
    """The source's format; None: Hugging Face's own."""
    to: str | None = None
    """The subject's format; None: a checkpoint."""
    ranks: str | None = None
    """The subject is rank files."""
    tokenizer: bool = False
    dtype: torch.dtype = torch.float32


ROUTES = (
    Route("Meta → checkpoint", "llama 8/2", "meta 2", tokenizer=True),
    Route("Meta, bf16 → checkpoint", "llama 8/2", "meta 2", dtype=torch.bfloat16),
    Route("Meta, Llama 3.2 → checkpoint", "llama 3.2", "meta 2"),
    Route("Megatron-LM core → checkpoint", "qwen3 untied", "mcore 2x2"),
    Route("Megatron-LM core, biases → checkpoint", "qwen2", "mcore 2x2"),
    Route("Megatron-LM core, 3.1's scaling → checkpoint", "llama 3.1", "mcore 2x2"),
    Route("Megatron-LM legacy → checkpoint", "llama", "legacy 2x2"),
    Route("Megatron-LLM → checkpoint", "mistral window", "epf 2x2"),
    Route("Megatron-LLM, Falcon → checkpoint", "falcon new decoder", "epf 2x2"),
    Route("alibaba's Megatron-LLaMA → checkpoint", "llama", "ali 2x2"),
    Route("MinfanZhao's Megatron-LLaMA → checkpoint", "llama", "mfz 2x2"),
    Route("EasyLM → checkpoint", "llama 8/2", "easylm"),
    Route("Hugging Face, YaRN → checkpoint", "yarn"),
    Route("Hugging Face, windows → checkpoint", "qwen2 window"),
    Route("Hugging Face, Falcon 71/1 → checkpoint", "falcon 71/1"),
    Route("checkpoint → Meta", "llama 8/2", to="meta 2"),
    Route("checkpoint → Megatron-LM core", "llama 3.1", to="mcore 2x2"),
    Route("checkpoint → Megatron-LM core, tied, windows", "tied", to="mcore 2x2"),
    Route("checkpoint → Megatron-LLM", "mistral window", to="epf 2x2"),
    Route("checkpoint → Megatron-LLM, Falcon", "falcon new decoder", to="epf 2x2"),
    Route("checkpoint → rank files, tied, virtual stages", "llama 3.2", ranks="2x2 vp2"),
    Route("checkpoint → rank files, 4 ranks of 2 KV heads", "llama 8/2", ranks="4x1"),
)  # fmt: skip


NOT_KNOWN = {
    ("Meta → checkpoint", "longest sequence"): "params.json does not say it; the card says what it could not compare",
    ("Meta, bf16 → checkpoint", "longest sequence"): "params.json does not say it",
    ("Meta, Llama 3.2 → checkpoint", "longest sequence"): "params.json does not say it",
    ("Meta, Llama 3.2 → checkpoint", "tied head stored as one of its own"): (
        "Meta's files hold a head of its own, equal to the embedding, and do not say that it is one with it"
    ),
}
"""What the source's own files leave open."""


@dataclass(slots=True)
class Laid:
    """A route's directories; `subject` is correct."""

    route: Route
    subject: Path
    reference: Path


@dataclass(slots=True)
class Found:
    """What verify said of a directory."""

    route: str
    fault: str
    caught: bool
    first: str
    """The first difference, or the error where there is no card."""
    checks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def by(self) -> list[dict[str, Any]]:
        return [check for check in self.checks if check["verdict"] == "fail"]


def lay(route: Route, folder: Path) -> Laid:
    """Make a route's conversion."""
    source = folder / "source"
    changes = {"vocab_size": TOKENS} if route.tokenizer else {}
    make_model(route.model, **changes).to(route.dtype).save_pretrained(source)
    if route.tokenizer:
        train_tokenizer(source)
    convert(source, folder / "checkpoint")
    if route.ranks:
        shard(folder / "checkpoint", folder / "subject", *RANKS[route.ranks])
    elif route.to:
        convert(folder / "checkpoint", folder / "subject", FORMATS[route.to])
    elif route.through:
        convert(folder / "checkpoint", folder / "there", FORMATS[route.through])
        told = Told(shape=open_source(folder / "checkpoint").shape)
        convert(folder / "there", folder / "subject", told=told)
        return Laid(route, folder / "subject", folder / "there")
    else:
        return Laid(route, folder / "checkpoint", source)
    return Laid(route, folder / "subject", folder / "checkpoint")


def train_tokenizer(folder: Path) -> None:
    """A SentencePiece BPE of Llama's kind, of a module's source."""
    text = folder / "text"
    text.write_text(inspect.getsource(argparse))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=TOKENS, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()


def faults_of(route: Route) -> dict[str, Callable[[Path], bool | None]]:
    """The faults that a wrong conversion of this kind may have."""
    if route.ranks:
        return rank_faults.RANK_FILE_FAULTS
    if route.to:
        return rank_faults.META_FAULTS if route.to.startswith("meta") else rank_faults.MEGATRON_FAULTS
    faults = hf_faults.FALCON_FAULTS if route.model.startswith("falcon") else hf_faults.FAULTS
    return {name: lambda path, fault=fault: edit(path, fault) for name, fault in faults.items()}


def edit(path: Path, fault: hf_faults.Fault) -> bool:
    """Let a fault alter a checkpoint's tensors, settings and files."""
    weights, config = path / "model.safetensors", path / "config.json"
    draft = hf_faults.Draft(path, load_file(weights), json.loads(config.read_text()))
    try:
        if fault(draft) is False:
            return False
    except (KeyError, RuntimeError):  # a tensor that this model has not, or sizes that the mistake does not fit
        return False
    save_file({name: tensor.contiguous() for name, tensor in draft.tensors.items()}, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(draft.config))
    return True


def plant(laid: Laid, name: str, folder: Path) -> Found | None:
    """Verify a copy of the subject with a fault; None where it does not apply or changes nothing."""
    subject = Path(shutil.copytree(laid.subject, folder / laid.subject.name))
    before = manifest.read(subject).digest
    if faults_of(laid.route)[name](subject) is False or sign(subject) == before:
        return None
    return ask(laid.route.name, name, subject, laid.reference, folder)


def sign(subject: Path) -> str:
    """Write the manifest anew, of the same origin; its digest."""
    made = manifest.read(subject)
    (subject / manifest.NAME).unlink()
    return manifest.write(subject, made.kind, made.source).digest


def ask(route: str, fault: str, subject: Path, reference: Path, folder: Path) -> Found:
    """What verify says."""
    output = folder / "verify.json"
    try:
        card = verify(subject, reference, output)
    except UserError as error:
        failed = output.with_suffix(".failed.json")
        if not failed.is_file():
            return Found(route, fault, True, str(error))
        card = json.loads(failed.read_text())
    return Found(route, fault, card["verdict"] == "fail", str(card["first_difference"]), card["checks"])


def plant_all(routes: tuple[Route, ...] = ROUTES) -> Iterator[Found]:
    """Every route as it is right (fault ""), then with each of its faults."""
    for route in routes:
        with tempfile.TemporaryDirectory() as folder:
            laid = lay(route, Path(folder))
            (Path(folder) / "right").mkdir()
            yield ask(route.name, "", laid.subject, laid.reference, Path(folder) / "right")
            for number, name in enumerate(faults_of(route)):
                where = Path(folder) / str(number)
                where.mkdir()
                if found := plant(laid, name, where):
                    yield found
                shutil.rmtree(where)


def margin(check: dict[str, Any]) -> float:
    """How many times the limit a value is; infinite where none is allowed or it could not be measured."""
    return check["value"] / check["limit"] if check["value"] is not None and check["limit"] else math.inf

"""Rank files against the checkpoint they were cut from: bit for bit, then in their own processes.

The rule of the layout is written here a second time, from its description and in the checkpoint's names, so that a
mistake in the family's table or its slices is not on both sides:

- q, k, v, gate and up are cut by rows, their biases likewise, o and down by columns, in tp equal parts; norms, and the
  biases of o and down, are whole in every file
- with fewer KV heads than tp, neighbouring ranks hold the same head of k and v
- embedding and head are cut by the vocabulary's true rows in parts of ceil(rows / tp), the last one shorter
- stage s of pp * vp, in the order of the flow, is on pipeline rank s % pp; without `layers` in the header all stages
  hold as many layers; embedding on the first rank, final norm and head on the last, a tied embedding on both
"""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmpipe.checkpoint import manifest
from llmpipe.errors import UserError
from llmpipe.inference.forward import rank_logits
from llmpipe.layout import Stages
from llmpipe.progress import progress
from llmpipe.verify.card import Check, Findings, at_most
from llmpipe.verify.compare import Trace, numeric_checks, probe, run, stream
from llmpipe.verify.hf import HfModel
from llmpipe.verify.memory import available_bytes
from llmpipe.verify.ours import OurModel

_LAYER = {
    "input_layernorm": "attention_norm",
    "ln_attn": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attention.dense": "attention.o",
    "post_attention_layernorm": "mlp_norm",
    "ln_mlp": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_OUTSIDE = {
    "model.embed_tokens": "embedding",
    "transformer.word_embeddings": "embedding",
    "model.norm": "norm",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
_BY_COLUMNS = ("attention.o", "mlp.down")
_INTEGER = {2: torch.int16, 4: torch.int32}


def is_rank_files(path: Path) -> bool:
    """Whether a directory holds rank files."""
    return (path / "tp0-pp0.safetensors").is_file()


def rank_file_checks(subject: Path, reference: Path) -> Findings:
    """Every check of rank files against their checkpoint, and the first tensor or layer that differs."""
    if not (reference / "config.json").is_file() or is_rank_files(reference):
        raise UserError(f"{reference} is no checkpoint: rank files are compared with the checkpoint they were cut from")
    checkpoint = HfModel(reference)
    checks, first = _origin(subject, reference)
    same, different = bit_checks(subject, checkpoint)
    checks += same
    if different or first:
        not_run = Check("forward in ranks", None, None, "not run", "the bytes differ, so it would say nothing")
        return [*checks, not_run], different or first
    more, where = forward_checks(subject, checkpoint)
    return checks + more, where


def bit_checks(subject: Path, checkpoint: HfModel) -> Findings:
    """Every byte of the checkpoint is in its place in every file that holds it, and nothing else is there."""
    files = {path.stem: safe_open(path, framework="pt") for path in sorted(subject.glob("*.safetensors"))}
    tp, stages = _layout(subject)
    places = Places(tp, stages, checkpoint)
    wrong = [f"{name}.safetensors is not of tp{tp}-{stages.name}" for name in files.keys() - places.names()]
    wrong += [f"{name}.safetensors is missing" for name in sorted(places.names() - files.keys())]
    left = {(name, key) for name, file in files.items() for key in file.offset_keys()}
    different, compared = [], 0
    with progress("compare", len(checkpoint.names()), "tensors") as shown:
        for name in checkpoint.names():
            kind, layer = _kind(name)
            key = _key(kind, layer, name)
            for file, part in places.held(kind, layer, checkpoint.read(name)):
                if file in files and (file, key) in left:
                    left.remove((file, key))
                    stored = files[file].get_tensor(key)
                    compared += stored.nbytes
                    different += _unequal(f"{key} in {file}.safetensors", stored, part)
                else:
                    wrong.append(f"{key} is missing in {file}.safetensors")
            shown.add(1, name)
    wrong += [f"{key} in {file}.safetensors is in no place of the checkpoint" for file, key in sorted(left)]
    equal = f"{compared:,} bytes in {tp * stages.pp} files, cut anew from {len(checkpoint.names())} tensors"
    return [
        at_most(
            "tensors missing or left over", len(wrong), 0, "; ".join(wrong[:4]) or "each in its file, and no other"
        ),
        at_most("slices not bit-equal", len(different), 0, "; ".join(different[:4]) or equal),
    ], next(iter(wrong + different), None)


class Places:
    """Which file holds which part of a tensor, by the rule above."""

    def __init__(self, tp: int, stages: Stages, checkpoint: HfModel):
        self.tp, self.pp, self.num_kv_heads = tp, stages.pp, checkpoint.kv_heads
        self.tied = checkpoint.config.tie_word_embeddings
        count, layers = stages.pp * stages.vp, checkpoint.num_layers
        self.ends = list(accumulate(stages.layers or [layers // count] * count))

    def names(self) -> set[str]:
        """The stems of all files."""
        return {f"tp{t}-pp{p}" for t in range(self.tp) for p in range(self.pp)}

    def held(self, kind: str, layer: int | None, whole: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Each file's stem with the part of a whole tensor that it holds."""
        ranks = [(t, p) for p in self.pipeline_ranks(kind, layer) for t in range(self.tp)]
        return [(f"tp{t}-pp{p}", self.part(whole, kind, t)) for t, p in ranks]

    def pipeline_ranks(self, kind: str, layer: int | None) -> list[int]:
        """The pipeline ranks that hold a tensor."""
        if layer is not None:
            return [next(stage for stage, end in enumerate(self.ends) if layer < end) % self.pp]
        if kind != "embedding":
            return [self.pp - 1]
        return sorted({0, self.pp - 1}) if self.tied else [0]

    def part(self, whole: torch.Tensor, kind: str, rank: int) -> torch.Tensor:
        """What a tp rank holds of a whole tensor."""
        vector = whole.ndim == 1
        if "norm" in kind or (vector and kind in _BY_COLUMNS):
            return whole
        if kind in ("attention.k", "attention.v") and self.num_kv_heads < self.tp:
            return whole.unflatten(0, (self.num_kv_heads, -1))[rank // (self.tp // self.num_kv_heads)]
        dim = 1 if kind in _BY_COLUMNS else 0
        each = (whole.shape[dim] + self.tp - 1) // self.tp
        start = min(rank * each, whole.shape[dim])
        return whole.narrow(dim, start, min(each, whole.shape[dim] - start))


def forward_checks(subject: Path, checkpoint: HfModel) -> Findings:
    """The sharded model in its tp x pp processes against transformers on the checkpoint, where it fits in memory."""
    tp, stages = _layout(subject)
    needed = int(1.3 * 4 * checkpoint.num_elements())
    if needed > available_bytes():
        detail = (
            f"{needed >> 30} GiB are needed in fp32, {available_bytes() >> 30} GiB are free; the slices are bit-equal"
        )
        return [Check("forward in ranks", None, None, "not run", detail)], None
    tokens, _ = probe(checkpoint.config.vocab_size, checkpoint.max_positions)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    trace = Trace(logits=(run(checkpoint, tokens, positions), rank_logits(subject, tokens, tp, stages)))
    checks = numeric_checks(trace, tokens)
    processes = f"{tp} x {stages.pp}"
    detail = f"logits of {processes} processes against transformers on the checkpoint, fp32: the rows above"
    checks.append(Check("forward in ranks", None, None, "pass", detail))
    if all(check.verdict == "pass" for check in checks):
        return checks, None
    alone = stream(checkpoint, OurModel(subject), tokens, positions).first_difference
    return checks, alone or f"the forward in {processes} ranks; in one process the same model agrees"


def _origin(subject: Path, reference: Path) -> Findings:
    """Whether the headers and the manifest name this checkpoint, and the files beside the weights are its own."""
    made, origin = manifest.read(subject), manifest.read(reference)
    wrong = [
        path.name for path in sorted(subject.glob("*.safetensors")) if _header(path).get("checkpoint") != origin.digest
    ]
    wrong += ["manifest.json"] if made.source.get("checkpoint") != origin.digest else []
    detail = f"{', '.join(wrong[:4])} name another checkpoint" if wrong else f"all name {origin.digest[:12]}"
    beside = {name: entry for name, entry in origin.files.items() if ".safetensors" not in name}
    other = [name for name, entry in beside.items() if made.files.get(name, {}).get("sha256") != entry["sha256"]]
    checks = [
        at_most("files of another checkpoint", len(wrong), 0, detail),
        at_most(
            "files beside the weights that differ", len(other), 0, ", ".join(other) or f"{', '.join(beside)} are equal"
        ),
    ]
    return checks, next((f"{check.name}: {check.detail}" for check in checks if check.verdict == "fail"), None)


def _unequal(name: str, stored: torch.Tensor, part: torch.Tensor) -> list[str]:
    """A sentence if two tensors are not the same bytes: equal floats may have other bits, and NaN equals nothing."""
    if stored.dtype != part.dtype or stored.shape != part.shape:
        return [f"{name} is {stored.dtype} {list(stored.shape)}, not {part.dtype} {list(part.shape)}"]
    bits = [x.contiguous().view(_INTEGER[x.element_size()]) for x in (stored, part)]
    if torch.equal(*bits):
        return []
    unequal = bits[0] != bits[1]
    return [
        f"{name} differs in {int(unequal.sum())} of {stored.numel()} elements, first at {unequal.nonzero()[0].tolist()}"
    ]


def _kind(name: str) -> tuple[str, int | None]:
    """What a checkpoint's tensor is, in our words, and its layer."""
    tensor, _, part = name.partition(":")
    base = tensor.rpartition(".")[0]
    if base in _OUTSIDE:
        return _OUTSIDE[base], None
    match = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)", base)
    if match and part:  # of Falcon's fused q, k and v
        return f"attention.{part}", int(match[1])
    if not match or match[2] not in _LAYER:
        raise UserError(f"{name} is no tensor of a checkpoint that rank files can hold")
    return _LAYER[match[2]], int(match[1])


def _key(kind: str, layer: int | None, name: str) -> str:
    suffix = name.partition(":")[0].rpartition(".")[2]  # weight or bias
    return f"{kind}.{suffix}" if layer is None else f"layers.{layer}.{kind}.{suffix}"


def _layout(subject: Path) -> tuple[int, Stages]:
    path = subject / "tp0-pp0.safetensors"
    header = _header(path)
    if not (str(header.get("tp")).isdecimal() and str(header.get("pp")).isdecimal()):
        raise UserError(
            f"{path} does not say its layout, tp and pp, in its header's metadata: shard the checkpoint again"
        )
    layers = tuple(map(int, header["layers"].split(","))) if "layers" in header else ()
    return int(header["tp"]), Stages(int(header["pp"]), int(header.get("vp", 1)), layers)


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}

"""The matrix's cells: which format can hold which model, by what its own code computes; a model's way through it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matrix_models import save, transformers_logits
from safetensors.torch import load_file

from llmpipe.checkpoint.convert import Target, convert, shard
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.families import Shape
from llmpipe.layout import Stages
from llmpipe.verify.compare import Side, probe, run
from llmpipe.verify.gate import open_reference
from llmpipe.verify.hf import HfModel

UNEVEN = Stages(3, 1, (1, 2, 1))
FORMATS = {
    **{f"meta {tp}": Target("meta", tp=tp) for tp in (1, 2, 4)},
    "easylm": Target("easylm"),
    **{f"{dialect} {name}": Target("megatron", dialect, tp, stages)
       for dialect in ("mcore", "legacy", "epf", "ali", "mfz")
       for name, tp, stages in (("1x1", 1, Stages()), ("2x2", 2, Stages(2)), ("1x3", 1, UNEVEN),
                                ("2x2 vp2", 2, Stages(2, 2)))},
}  # fmt: skip
# Per model: Meta in 1, 2, 4 files; EasyLM; mcore, legacy, epf, ali, mfz in 1x1, 2x2, uneven 1x3, 2x2 with vp2.
# x: it can be written, for the system's own code computes this model, split so; everything else has to be refused.
_HOLDS = """
llama               xxx x xxxx xxxx xx.x xx.x xx.x
llama 8/2           xx. x xxxx xxxx xx.x .... ....
llama 6/3           x.. x x.x. x.x. x... .... ....
llama 3.1           xx. . xxxx .... .... .... ....
llama 3.2           xx. . xxxx .... .... .... ....
codellama           xxx x xxxx xxxx xx.x xx.x xx.x
tied                xx. x xxxx xxxx .... .... ....
linear              ... . xxxx xxxx xx.x .... ....
dynamic             ... . .... .... .... .... ....
yarn                ... . .... .... .... .... ....
biases              ... . xxxx xxxx .... .... ....
wide heads          ... . xxxx xxxx .... .... ....
extended            xxx x xxxx xxxx xx.x xx.x xx.x
mistral             xx. x xxxx xxxx xx.x .... ....
mistral window      ... . xxxx .... xx.x .... ....
falcon 71/1         ... . .... .... x... .... ....
falcon new decoder  ... . .... .... xx.x .... ....
qwen2               ... . xxxx xxxx .... .... ....
qwen2 window        ... . .... .... .... .... ....
qwen3               ... . xxxx .... .... .... ....
qwen3 untied        ... . xxxx .... .... .... ....
"""
HOLDS = {
    line[:20].strip(): [name for name, mark in zip(FORMATS, line[20:].replace(" ", ""), strict=True) if mark == "x"]
    for line in _HOLDS.strip().splitlines()
}
RANKS = {
    "1x1": (1, Stages()), "2x1": (2, Stages()), "1x2": (1, Stages(2)), "4x1": (4, Stages()), "2x2": (2, Stages(2)),
    "1x3": (1, UNEVEN), "2x2 vp2": (2, Stages(2, 2)), "4x2": (4, Stages(2)),
}  # fmt: skip
# 6 or 71 query heads are not dealt to 4 (or 2) ranks; 3 KV heads neither; a model of 2 layers has no 3 or 4 stages.
SPLITS = {
    "llama 6/3": ("1x1", "1x2", "1x3"),
    "falcon 71/1": ("1x1", "1x2"),
}
LIMIT = 1e-5  # of the largest logit
"""What a format's files do not say of the models that it holds: told by --shape."""
UNSAID = {
    "meta": {"max_positions", "tie_embeddings", "family"}, "easylm": {"tie_embeddings", "family"},
    "mcore": {"family"}, "legacy": {"family"}, "epf": set(), "ali": set(), "mfz": set(),
}  # fmt: skip


@dataclass(slots=True)
class Made:
    """A model of transformers', its checkpoint, and what transformers computes with it."""

    name: str
    hf: Path
    checkpoint: Path
    tensors: dict[str, torch.Tensor]
    """As transformers wrote them."""
    shape: Shape
    tokens: torch.Tensor
    positions: torch.Tensor
    logits: torch.Tensor


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Made:
    """Written by transformers, converted, run by transformers at short and at long positions."""
    hf, checkpoint = save(name, folder / "hf", dtype), folder / "checkpoint"
    convert(hf, checkpoint)
    side = HfModel(hf)
    tokens, positions = probe(side.config.vocab_size, side.longest_text)
    logits = transformers_logits(hf, tokens, positions)
    tensors = load_file(hf / "model.safetensors")
    return Made(name, hf, checkpoint, tensors, open_source(checkpoint).shape, tokens, positions, logits)


@torch.inference_mode()
def difference(made: Made, side: Side) -> float:
    """max |Δlogit| / max |logit| from transformers' whole model."""
    found = run(side, made.tokens, made.positions)
    return float((found - made.logits).abs().max() / made.logits.abs().max())


def unequal(made: Made, directory: Path) -> list[str]:
    """The tensors of a checkpoint that are not transformers' own, bit for bit."""
    found = load_file(directory / "model.safetensors")
    names = sorted(found.keys() ^ made.tensors.keys())
    return names + [name for name in found if name not in names and not same_bits(found[name], made.tensors[name])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def there(made: Made, name: str, folder: Path) -> Path:
    """The checkpoint in a format; UserError if it is refused."""
    convert(made.checkpoint, folder, FORMATS[name])
    return folder


def back(made: Made, written: Path, folder: Path) -> Path:
    """A checkpoint again."""
    convert(written, folder, told=Told(shape=made.shape))
    return folder


def plain_forward(made: Made, written: Path) -> float:
    """How far the plain forward of the format's own convention is from transformers."""
    return difference(made, open_reference(written, None, HfModel(made.hf).hyper_parameters()))


def deal(made: Made, name: str, folder: Path) -> Path:
    """Rank files."""
    shard(made.checkpoint, folder, *RANKS[name])
    return folder


def unlike(one: Shape, other: Shape) -> set[str]:
    """The fields of two shapes that differ."""
    return {name for name in Shape.__dataclass_fields__ if getattr(one, name) != getattr(other, name)}

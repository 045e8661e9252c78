"""LoRA adapters in PEFT's format merged into a reference's weights, by the formulas that PEFT and the papers give.

    W + s B A                    LoRA (arXiv:2106.09685), s = alpha / r; with rsLoRA (arXiv:2312.03732) alpha / sqrt(r)
    W + s (B A)^T                of an embedding, whose factors lie across
    m (W + s B A) / |W + s B A|  DoRA (arXiv:2402.09353): each row is brought to the length m

The rules are written here a second time, with nothing of convert's: r is the factors' own size, and a tensor that the
adapter trained whole stands for the model's. Everything is computed in fp64 and rounded once, to the stored type.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llmpipe.errors import UserError
from llmpipe.files import sha256
from llmpipe.verify.hf_files import state_dict

HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.word_embeddings.weight")
# Words that PEFT's wrappers put into the names of a model's modules.
_WRAPPERS = ("base_layer", "modules_to_save", "default")
# PEFT may write a whole tensor thrice: by its plain name, as it was trained, and as it was before.
_TRAINED, _UNTRAINED = ".modules_to_save.", ".original_module."
_PAIRS = ({"lora_A", "lora_B"}, {"lora_A", "lora_B", "lora_magnitude_vector"}, {"lora_embedding_A", "lora_embedding_B"})
# Settings that change the sum, or the weights it starts from, and that no tensor's name tells of.
_OTHERS = ("alora_invocation_tokens", "layer_replication", "kasa_config", "use_bdlora", "use_qalora")
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_ROWS = 1024
# What two ways of summing the same products may differ by, in units of the largest.
ROUNDING = 1e-13


class Adapter:
    """An adapter's tensors by the names of Hugging Face's tensors that they change."""

    def __init__(self, path: Path, files: dict[str, str]):
        """UserError for what is no LoRA adapter, or not the one of these files, by their SHA-256."""
        for name, digest in files.items():
            _check_same(path / name, digest)
        self.path, self.config = path, _config(path)
        self._tensors = _Tensors(path)
        self._factors: dict[str, dict[str, str]] = {}
        """Name of a weight to its factors' kinds and names."""
        self._own: dict[str, str] = {}
        for name in sorted(self._tensors.names(), key=lambda name: _TRAINED in name):
            if _UNTRAINED in name:
                continue
            target, kind = _place(name)
            (self._factors.setdefault(target, {}) if kind else self._own)[kind or target] = name
        for target, kinds in self._factors.items():
            if kinds.keys() not in _PAIRS:
                raise UserError(f"{path}: the reference forward cannot merge {', '.join(kinds)} into {target}")
        self._shift = 0.0
        self.written: torch.dtype | None = None
        """The type of the other side, if it has one: what is wider than the model's is what merging rounds to."""

    def computes(self, name: str) -> bool:
        """Whether a tensor is a sum that rounding may bring to the neighbouring value."""
        return name in self._factors

    def targets(self) -> list[str]:
        """The names of the tensors that it changes."""
        return [*self._factors, *self._own]

    def rows(self, name: str) -> int | None:
        """How many rows the adapter's own table has; None if it has none."""
        return len(self._read(self._own[name])) if name in self._own else None

    def embedding_rows(self) -> int | None:
        """How many rows the adapter's own embedding has; None if it has none."""
        return next(filter(None, map(self.rows, EMBEDDINGS)), None)

    def keeps_tied(self, embedding: str, rows: int) -> bool:
        """Whether a head that was the embedding of so many rows still is."""
        changed = [name for name in (embedding, HEAD) if name in self._factors or name in self._own]
        if not changed:
            return True
        if changed == [embedding] and self.rows(embedding) not in (None, rows):
            if embedding.removesuffix(".weight").endswith(tuple(self.config.get("modules_to_save") or ())):
                raise UserError(f"{self.path}: {embedding} was resized apart from the head, whose rows are in no file")
            return True  # resized, and saved once for both
        own = [self._own.get(name) for name in (embedding, HEAD)]
        alone = not any(name in self._factors for name in changed)
        return alone and None not in own and torch.equal(*(self._read(name) for name in own if name))

    @contextmanager
    def shifted(self, by: float) -> Iterator[None]:
        """Sums that are off by `by` of their largest term, to see what rounding can do."""
        self._shift = by
        yield
        self._shift = 0.0

    def into(self, name: str, weight: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A reference's weight (out, in), or vector, with the adapter's change of Hugging Face's tensor `name`.

        `rows`: which rows of that tensor these are, one for each; None: all of them, in order.
        """
        base, name = self._base(name, weight, rows)
        dtype = self._type(name, weight.dtype)
        if name not in self._factors:
            return base.to(dtype)
        down, up, lengths = self._parts(name)  # (r, in), (out, r), (out,)
        if rows is not None:
            up, lengths = up[rows], lengths[rows] if lengths is not None else None
        if base.shape != (len(up), down.shape[1]):
            raise UserError(
                f"{self.path}: {name} is {list(base.shape)}, the adapter's is {[len(up), down.shape[1]]}: it is no"
                " adapter of this model"
            )
        merged, scale = torch.empty(base.shape, dtype=dtype), self._scale(name, len(down))
        for part in torch.arange(len(base)).split(_ROWS):
            length = None if lengths is None else lengths[part].double()
            merged[part] = self._sum(base[part].double(), scale * up[part].double(), down, length).to(dtype)
        return merged

    def _type(self, name: str, own: torch.dtype) -> torch.dtype:
        """What a tensor that is the model's in its own type is rounded to."""
        changed = name in self._factors or name in self._own
        return torch.promote_types(own, self.written) if changed and self.written else own

    def _sum(
        self, base: torch.Tensor, up: torch.Tensor, down: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Some rows in fp64."""
        added = base + up @ down
        if self._shift:
            terms = base.abs().amax(1, keepdim=True) + up.abs() @ down.abs().amax(1, keepdim=True)  # (rows, 1)
            added = added + self._shift * terms
        return added if lengths is None else added * (lengths / (base + up @ down).norm(dim=1))[:, None]

    def _base(self, name: str, weight: torch.Tensor, rows: torch.Tensor | None) -> tuple[torch.Tensor, str]:
        """What the sum starts from, and its name: a head that was saved as the resized embedding is that."""
        if name == HEAD and HEAD not in self._own and HEAD not in self._factors:
            name = next((other for other in EMBEDDINGS if self.rows(other) not in (None, len(weight))), name)
        if name not in self._own:
            return weight, name
        own = self._read(self._own[name])
        return (own if rows is None else own[rows]), name

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A (r, in) in fp64, B (out, r) and DoRA's lengths (out,)."""
        held = {kind: self._read(stored) for kind, stored in self._factors[name].items()}
        if "lora_embedding_A" in held:
            return held["lora_embedding_B"].T.double(), held["lora_embedding_A"].T, None
        lengths = held.get("lora_magnitude_vector")
        if (lengths is not None) != bool(self.config.get("use_dora")):
            raise UserError(f"{self.path}: use_dora is {self.config.get('use_dora')}, unlike the tensors of {name}")
        return held["lora_A"].double(), held["lora_B"], None if lengths is None else lengths.flatten()

    def _scale(self, name: str, rank: int) -> float:
        """s; a pattern is a regular expression for the end of a module's name."""
        module = name.removesuffix(".weight")
        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        fits = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
        alpha = next(fits, self.config["lora_alpha"])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _read(self, stored: str) -> torch.Tensor:
        return self._tensors.read(stored)


class _Tensors:
    """The adapter's file: safetensors, or a .bin of nothing but tensors; one is in memory while it is used."""

    def __init__(self, path: Path):
        file = next(found for end in ("safetensors", "bin") if (found := path / f"adapter_model.{end}").is_file())
        self._file: Any = state_dict(file) if file.suffix == ".bin" else safe_open(file, framework="pt")

    def names(self) -> list[str]:
        return list(self._file.keys())

    def read(self, name: str) -> torch.Tensor:
        return self._file[name] if isinstance(self._file, dict) else self._file.get_tensor(name)


def _check_same(file: Path, digest: str) -> None:
    if not file.is_file():
        raise UserError(f"{file}, which was merged into the checkpoint, is not there: say with --adapter where it is")
    if sha256(file) != digest:
        raise UserError(f"{file} is not the one that was merged into the checkpoint: name that with --adapter")


def _config(path: Path) -> dict[str, Any]:
    config = json.loads((path / "adapter_config.json").read_text())
    told = [f"{key}: {config[key]}" for key in _OTHERS if config.get(key)]
    told += [f"peft_type: {config['peft_type']}"] if config.get("peft_type", "LORA") != "LORA" else []
    start = config.get("init_lora_weights", True)
    told += [f"init_lora_weights: {start}"] if start not in _STARTS else []
    if told:
        raise UserError(f"{path}: the reference forward does not merge {', '.join(told)}")
    return config


def _place(name: str) -> tuple[str, str | None]:
    """The model's tensor that one of the adapter's changes, and which factor it is; None: it stands for it whole."""
    words = [word for word in name.removeprefix("base_model.model.").split(".") if word not in _WRAPPERS]
    factor = next((number for number, word in enumerate(words) if word.startswith("lora_")), None)
    if factor is None:
        return ".".join(words), None
    if words[factor + 1 :] not in ([], ["weight"]):
        return ".".join(words), name  # no kind that is known: refused
    return ".".join([*words[:factor], "weight"]), words[factor]

"""A plain forward over a Hugging Face directory, by transformers' own layers: transformers defines what one means.

The model is built on the meta device from config.json; one layer at a time gets its weights from the safetensors files.
"""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from llmpipe.errors import UserError


class HfModel:
    """A Hugging Face directory as a model that runs block by block in fp32; only one block is in memory at a time."""

    kind = "Hugging Face"

    def __init__(self, path: Path, rounded_to: torch.dtype | None = None):
        """`rounded_to`: the other side stores its weights in this type, so ours are rounded to it before use."""
        self.path, self.rounded_to = path, rounded_to
        self.config, self.model = _empty_model(path)
        self.rotary = type(self.model.model.rotary_emb)(config=self.config)
        self.num_layers: int = self.config.num_hidden_layers
        self.files = _key_files(path)
        self._handles: dict[str, Any] = {}

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    def names(self) -> list[str]:
        """Every tensor in the files, in the order of the flow."""
        return sorted(self.files, key=_place)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; UserError if no file has it."""
        return self._handle(name).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read."""
        return self._handle(name).get_slice(name)[:0].dtype

    def num_elements(self) -> int:
        """Of all tensors together; nothing is read."""
        return sum(math.prod(self._handle(name).get_slice(name).get_shape()) for name in self.files)

    def hyper_parameters(self) -> dict[str, float]:
        """What shapes the arithmetic, as transformers reads config.json."""
        config = self.config
        return {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "query heads": config.num_attention_heads,
            "KV heads": config.num_key_value_heads,
            "head size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "MLP rows": config.intermediate_size,
            "vocabulary": config.vocab_size,
            "norm eps": config.rms_norm_eps,
            "rope theta": config.rope_parameters["rope_theta"],
            "tied embedding": int(config.tie_word_embeddings),
            "longest sequence": config.max_position_embeddings,
        }

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self._rounded(self.read("model.embed_tokens.weight")[tokens])

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""
        module = self._filled(self.model.model.layers[layer], f"model.layers.{layer}.")
        out = module(hidden, position_embeddings=self.rotary(hidden, position_ids=positions))
        return out[0] if isinstance(out, tuple) else out

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        hidden = self._filled(self.model.model.norm, "model.norm.")(hidden)
        name = "model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return torch.nn.functional.linear(hidden, self._rounded(self.read(name)))

    def _handle(self, name: str) -> Any:
        """The open file that holds a tensor."""
        if name not in self.files:
            raise UserError(f"{self.path} lacks {name}, which transformers needs: convert it again")
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = safe_open(self.path / file, framework="pt")
        return self._handles[file]

    def _filled(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """A copy of a module of the meta model, with the files' weights."""
        state = {name: self._rounded(self.read(prefix + name)) for name in module.state_dict()}
        filled = copy.deepcopy(module)
        try:
            filled.load_state_dict(state, assign=True)
        except RuntimeError as error:  # sizes
            raise UserError(f"{self.path}: the tensors {prefix}* do not fit config.json: {error}") from error
        return filled.eval()

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to(self.rounded_to) if self.rounded_to else tensor).float()


def _empty_model(path: Path) -> tuple[Any, Any]:
    """What config.json describes, by transformers, without memory for weights."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read by transformers: {error}") from error
    if config.model_type != "llama":
        raise UserError(f"{path / 'config.json'}: model_type {config.model_type!r}: this version verifies 'llama' only")
    return config, model


def _place(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1 if "embed_tokens" in name else 1 << 30), name


def _key_files(path: Path) -> dict[str, str]:
    """The file of each tensor, by the files' own headers; UserError if the index says otherwise."""
    files: dict[str, str] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                files |= dict.fromkeys(handle.keys(), file.name)
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file ({error}): make it again") from error
    if not files:
        raise UserError(f"{path} has config.json but no *.safetensors: put the weight files beside it")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text())["weight_map"]
        wrong = sorted(name for name in files.keys() | listed.keys() if files.get(name) != listed.get(name))
        if wrong:
            raise UserError(
                f"{index} disagrees with the files: {wrong[0]} is in {files.get(wrong[0], 'none')}, not where it says"
            )
    return files

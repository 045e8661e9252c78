"""A plain forward over a Hugging Face directory, by transformers' own layers: transformers defines what one means.

The model is built on the meta device from config.json; one layer at a time gets its weights from the safetensors files.
"""

import copy
import math
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmpipe.errors import UserError
from llmpipe.verify.hf_files import WeightFiles, read_config

# Where a transformers model keeps its embedding, layers and last norm, by the name of its inner model.
_PLACES = {"model": ("embed_tokens", "layers", "norm"), "transformer": ("word_embeddings", "h", "ln_f")}
_FUSED = "query_key_value"
KINDS = ("llama", "mistral", "qwen2", "qwen3", "falcon")


class HfSettings:
    """What config.json says, as transformers reads it; no weights are needed."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.model = _empty_model(path)
        self.prefix: str = self.model.base_model_prefix
        self.num_layers: int = self.config.num_hidden_layers

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings

    @property
    def longest_text(self) -> int:
        """How many positions the model is made for: those of its rope scaling where these are more."""
        rope = self.config.rope_parameters
        original = rope.get("original_max_position_embeddings", self.max_positions)
        return max(self.max_positions, int(rope.get("factor", 1) * original))

    def hyper_parameters(self) -> dict[str, float | str]:
        """What shapes the arithmetic, as transformers reads config.json."""
        config = self.config
        eps = config.layer_norm_epsilon if self.prefix == "transformer" else config.rms_norm_eps
        return {
            "layers": config.num_hidden_layers,
            "hidden size": config.hidden_size,
            "query heads": config.num_attention_heads,
            "KV heads": self.kv_heads,
            "head size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "MLP rows": config.ffn_hidden_size if self.prefix == "transformer" else config.intermediate_size,
            "vocabulary": config.vocab_size,
            "norm eps": eps,
            **rope_settings(config.rope_parameters),
            "window": self._window(),
            "tied embedding": int(config.tie_word_embeddings),
            "longest sequence": config.max_position_embeddings,
            **{f"{name} token": str(getattr(config, f"{name}_token_id", None)) for name in ("bos", "eos")},
        }

    @property
    def kv_heads(self) -> int:
        config = self.config
        if self.prefix == "transformer" and not config.new_decoder_architecture:
            return 1 if config.multi_query else config.num_attention_heads
        return config.num_kv_heads if self.prefix == "transformer" else config.num_key_value_heads

    def _window(self) -> str:
        """The window, and the layers that have it, in words."""
        windows = [self._window_of(layer) for layer in range(self.num_layers)]
        if not any(windows):
            return "none"
        return f"{max(filter(None, windows))} from layer {next(i for i, size in enumerate(windows) if size)}"

    def _window_of(self, layer: int) -> int | None:
        kinds = getattr(self.config, "layer_types", None)
        if kinds:
            return self.config.sliding_window if kinds[layer] == "sliding_attention" else None
        return getattr(self.config, "sliding_window", None)


class HfModel(HfSettings):
    """A Hugging Face directory as a model that runs block by block in fp32; only one block is in memory at a time."""

    kind = "Hugging Face"

    def __init__(self, path: Path, rounded_to: torch.dtype | None = None):
        """`rounded_to`: the other side stores its weights in this type, so ours are rounded to it before use."""
        super().__init__(path)
        self.rounded_to = rounded_to
        self.inner = getattr(self.model, self.prefix)
        self._embedding, self._layers, self._norm = _PLACES[self.prefix]
        self.files = WeightFiles(path)

    def names(self) -> list[str]:
        """Every tensor in the files, in the order of the flow, Falcon's fused q, k and v in three.

        Left out: frequencies that old files carry, which follow from theta, and a head that is the embedding.
        """
        found = sorted((name for name in self.files.names() if not self._follows(name)), key=_place)
        return [part for name in found for part in ([f"{name}:{w}" for w in "qkv"] if _FUSED in name else [name])]

    def _follows(self, name: str) -> bool:
        return name.endswith("inv_freq") or (name == "lm_head.weight" and self.config.tie_word_embeddings)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored type; UserError if no file has it."""
        name, _, part = name.partition(":")
        whole = self.files.read(name)
        if not part:
            return whole
        each = self.config.num_attention_heads // self.kv_heads
        heads = whole.view(self.kv_heads, each + 2, -1, whole.shape[1])  # (K, H/K + 2, D, C): queries, then K, then V
        rows = {"q": heads[:, :each], "k": heads[:, each], "v": heads[:, each + 1]}[part]
        return rows.reshape(-1, whole.shape[1])

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's stored type; nothing is read."""
        return self.files.dtype(name.partition(":")[0])

    def num_elements(self) -> int:
        """Of all tensors together; nothing is read."""
        return sum(math.prod(self.files.shape(name)) for name in self.files.names())

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to hidden states (B, T, C)."""
        return self._rounded(self.read(f"{self.prefix}.{self._embedding}.weight")[tokens])

    def block(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One layer on hidden states (B, T, C) at positions (B, T)."""
        module = self._filled(getattr(self.inner, self._layers)[layer], f"{self.prefix}.{self._layers}.{layer}.")
        given: dict[str, Any] = {"alibi": None} if self.prefix == "transformer" else {}
        mask = self._mask(layer, hidden.shape[1])
        out = module(hidden, attention_mask=mask, position_embeddings=self._turns(hidden, positions), **given)
        return out[0] if isinstance(out, tuple) else out

    def _mask(self, layer: int, length: int) -> torch.Tensor | None:
        """(1, 1, T, T), added to the scores: a token sees itself and the window - 1 before it; None: all before it."""
        window = self._window_of(layer)
        if window is None or window >= length:
            return None
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
        return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)

    def _turns(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, T, D), each row by a module of its own: dynamic scaling looks at the longest of a batch."""
        rotary = type(self.inner.rotary_emb)
        rows = [rotary(config=self.config)(hidden[:1], position_ids=row[None]) for row in positions]
        return torch.cat([cos for cos, _ in rows]), torch.cat([sin for _, sin in rows])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, C) to logits (B, T, V)."""
        hidden = self._filled(getattr(self.inner, self._norm), f"{self.prefix}.{self._norm}.")(hidden)
        name = f"{self.prefix}.{self._embedding}.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        return torch.nn.functional.linear(hidden, self._rounded(self.read(name)))

    def _filled(self, module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        """A copy of a module of the meta model, with the files' weights."""
        state = {name: self._rounded(self.files.read(prefix + name)) for name in module.state_dict()}
        filled = copy.deepcopy(module)
        try:
            filled.load_state_dict(state, assign=True)
        except RuntimeError as error:  # sizes
            raise UserError(f"{self.path}: the tensors {prefix}* do not fit config.json: {error}") from error
        return filled.eval()

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.to(self.rounded_to) if self.rounded_to else tensor).float()


def rope_settings(rope: dict[str, Any]) -> dict[str, float | str]:
    """Rotary settings as rows of the hyper-parameters; those of a scaling stand under its keys."""
    named = {"rope_theta": "rope theta", "rope_type": "rope scaling"}
    found = {named.get(key, f"rope {key}"): value for key, value in rope.items() if value is not None}
    return {"rope scaling": "default"} | found


def _empty_model(path: Path) -> tuple[Any, Any]:
    """What config.json describes, by transformers, without memory for weights."""
    try:
        config = read_config(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read by transformers: {error}") from error
    if config.model_type not in KINDS:
        raise UserError(
            f"{path / 'config.json'}: model_type {config.model_type!r}: llmpipe verifies {', '.join(KINDS)}"
        )
    return config, model


def _place(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    match = re.match(r"(?:model\.layers|transformer\.h)\.(\d+)\.", name)
    return (int(match[1]) if match else -1 if "embed" in name else 1 << 30), name

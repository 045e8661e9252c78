"""What Megatron's training arguments say of the arithmetic, for the plain forward.

The forks name the same things differently and leave out different ones. Where the arguments are silent the fork's own
fixed value holds, if its code has one; else the caller's assumption; else there is an error that asks.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmpipe.errors import UserError

# Settings by the names of the card, and the arguments that say them in one fork or another.
_ARGUMENTS = {
    "query heads": ("num_attention_heads",),
    "head size": ("kv_channels",),
    "norm eps": ("rmsnorm_epsilon", "norm_epsilon", "layernorm_epsilon"),
    "rope theta": ("rope_theta", "rotary_base"),
    "longest sequence": ("max_position_embeddings",),
    "vocabulary": ("orig_vocab_size", "vocab_size"),
}
# What the forks' code takes where their arguments do not say: Megatron-LLM's defaults; both Megatron-LLaMAs' constant.
_FIXED = {
    "Megatron-LLM": {"rope theta": 1e4, "norm eps": 1e-5},
    "alibaba's Megatron-LLaMA": {"rope theta": 1e4},
    "MinfanZhao's Megatron-LLaMA": {"rope theta": 1e4},
}
# Llama 3.1's scaling as Megatron-LM has it in its code: low and high frequency factors, first longest sequence.
_LLAMA3 = (1.0, 4.0, 8192.0)


class Settings:
    """The numbers that the forward needs; `known()` are those that the files or the user say."""

    def __init__(
        self, path: Path, fork: str, args: dict[str, Any], said: Mapping[str, float], assumed: Mapping[str, float]
    ):
        self.args, self.said, self.assumed, self.fork, self.path = args, said, assumed, fork, path
        self._known: dict[str, float] = {}
        if args.get("glu_activation") not in (None, "swiglu") or args.get("rotary_percent") not in (None, 1, 1.0):
            raise UserError(f"{path}: the reference forward knows swiglu, and rotary_percent 1, only")
        self.eps = self._get("norm eps")
        self.theta = self._get("rope theta")
        self.window = self._window()
        self.less_one = bool(args.get("apply_layernorm_1p"))
        self.stretch = float(args.get("rope_scaling_factor") or args.get("rotary_seq_len_interpolation_factor") or 1)
        self.llama3 = 0.0
        if args.get("use_rope_scaling"):  # there rope_scaling_factor is Llama 3.1's, 8 where the code fixes it
            self.llama3, self.stretch = float(args.get("rope_scaling_factor") or 8), 1.0
        if "max_position_embeddings" in args or "longest sequence" in said:
            self._get("longest sequence")

    def read_heads(self, hidden: int) -> None:
        """Head counts; the files of alibaba and MinfanZhao have as many KV heads as query heads."""
        self.num_heads = int(self._get("query heads"))
        if "KV heads" in self.said:
            self.num_kv_heads = int(self.said["KV heads"])
        elif self.args.get("group_query_attention"):
            self.num_kv_heads = self.args["num_query_groups"]
        else:
            self.num_kv_heads = self.args.get("num_attention_heads_kv") or self.num_heads
        self.head_dim = int(self.said.get("head size") or self.args.get("kv_channels") or hidden // self.num_heads)
        if "query heads" in self._known:
            self._known |= {"KV heads": self.num_kv_heads, "head size": self.head_dim}

    def vocab(self, padded: int) -> int:
        """True rows of the embedding; all of them where nobody says."""
        if self.args.get("vocab_size") == padded:  # may be the padded size itself
            self.args = {name: value for name, value in self.args.items() if name != "vocab_size"}
        found = self._get("vocabulary", self.assumed.get("vocabulary", padded))
        if not 0 < found <= padded:
            raise UserError(f"{self.path}: the vocabulary is {found:g}, but the embedding has {padded} rows")
        return int(found)

    def said_tied(self) -> bool:
        """Whether the arguments say that the head is the embedding."""
        return (
            self.args.get("tie_embed_logits") is True or self.args.get("untie_embeddings_and_output_weights") is False
        )

    def known(self) -> dict[str, float]:
        """By the card's names."""
        return dict(self._known)

    def frequencies(self) -> torch.Tensor:
        """Radians per position of each rotary pair: (D / 2,)."""
        plain = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if not self.llama3:
            return plain
        low, high, first = _LLAMA3
        turns = first * plain / (2 * math.pi)  # within the first longest sequence
        share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept, 0: slowed down by the factor
        return plain * (share + (1 - share) / self.llama3)

    def _get(self, name: str, otherwise: float | None = None) -> float:
        """The user's word, the arguments', the fork's fixed value, or the assumption."""
        if name in self.said:
            self._known[name] = self.said[name]
            return self.said[name]
        for argument in _ARGUMENTS[name]:
            if self.args.get(argument) is not None:
                self._known[name] = self.args[argument]
                return self.args[argument]
        if name in _FIXED.get(self.fork, {}):
            self._known[name] = _FIXED[self.fork][name]
            return self._known[name]
        if otherwise is not None or name in self.assumed:
            return self.assumed[name] if otherwise is None else otherwise
        raise UserError(f"{self.path}: the files do not say the {name}, which {self.fork} takes from the command line")

    def _window(self) -> int | None:
        """How many keys a query sees; Megatron-LM's window_size is the distance to the first."""
        if self.args.get("window_size"):
            return int(self.args["window_size"][0]) + 1
        window = self.said.get("sliding window") or self.args.get("sliding_window_size")
        return int(window) if window else None

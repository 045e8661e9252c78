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
# Llama 3.1's scaling as Megatron-LM has it in its code, by the card's names.
_LLAMA3 = {"rope low_freq_factor": 1.0, "rope high_freq_factor": 4.0, "rope original_max_position_embeddings": 8192}
Value = float | str


class Settings:
    """The numbers that the forward needs; `known()` are those that the files or the user say."""

    def __init__(
        self, path: Path, fork: str, args: dict[str, Any], said: Mapping[str, Value], assumed: Mapping[str, Value]
    ):
        self.args, self.said, self.assumed, self.fork, self.path = args, said, assumed, fork, path
        self._known: dict[str, Value] = {}
        if args.get("glu_activation") not in (None, "swiglu") or args.get("rotary_percent") not in (None, 1, 1.0):
            raise UserError(f"{path}: the reference forward knows swiglu, and rotary_percent 1, only")
        self.eps = self._get("norm eps")
        self.theta = self._get("rope theta")
        self.window = self._window()
        self.scaling = self._scaling()
        self.less_one = bool(args.get("apply_layernorm_1p"))
        if "max_position_embeddings" in args or "longest sequence" in said:
            self._get("longest sequence")

    @property
    def stretch(self) -> float:
        """What positions are divided by."""
        return float(self.scaling["rope factor"]) if self.scaling["rope scaling"] == "linear" else 1.0

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
        if self.args.get("vocab_size") == padded and "vocabulary" in self.assumed:  # may be the padded size itself
            self.args = {name: value for name, value in self.args.items() if name != "vocab_size"}
        found = self._get("vocabulary", self.assumed.get("vocabulary", padded))
        if not 0 < found <= padded:
            raise UserError(f"{self.path}: the vocabulary is {found:g}, but the embedding has {padded} rows")
        return int(found)

    def said_tied(self) -> bool:
        """Whether the arguments say that the head is the embedding; alibaba's causal_lm has one of its own, always."""
        if self.args.get("causal_lm"):
            return False
        return (
            self.args.get("tie_embed_logits") is True or self.args.get("untie_embeddings_and_output_weights") is False
        )

    def known(self) -> dict[str, Value]:
        """By the card's names."""
        return dict(self._known)

    def frequencies(self) -> torch.Tensor:
        """Radians per position of each rotary pair: (D / 2,)."""
        plain = 1.0 / self.theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        if self.scaling["rope scaling"] != "llama3":
            return plain
        low, high, first = (float(self.scaling[name]) for name in _LLAMA3)
        turns = first * plain / (2 * math.pi)  # within the first longest sequence
        share = ((turns - low) / (high - low)).clamp(0, 1)  # 1: kept, 0: slowed down by the factor
        return plain * (share + (1 - share) / float(self.scaling["rope factor"]))

    def _get(self, name: str, otherwise: Value | None = None) -> float:
        """The user's word, the arguments', the fork's fixed value, or the assumption."""
        found = self.said.get(name)
        if found is None:
            found = next((self.args[a] for a in _ARGUMENTS[name] if self.args.get(a) is not None), None)
        if found is None:
            found = _FIXED.get(self.fork, {}).get(name)
        if found is not None:
            self._known[name] = found
            return float(found)
        otherwise = self.assumed.get(name) if otherwise is None else otherwise
        if otherwise is None:
            raise UserError(
                f"{self.path}: the files do not say the {name}, which {self.fork} takes from the command line"
            )
        return float(otherwise)

    def _window(self) -> int | None:
        """How many keys a query sees; Megatron-LM's window_size is the distance to the first."""
        words = self.said.get("window")
        if words is None and self.args:
            distance, size = self.args.get("window_size"), self.args.get("sliding_window_size")
            size = distance[0] + 1 if distance else size
            words = f"{size} from layer 0" if size else "none"
        if words is not None:
            self._known["window"] = words
        found = str(words or self.assumed.get("window", "none")).split()[0]
        return None if found == "none" else int(found)

    def _scaling(self) -> dict[str, Value]:
        """The scaling of positions, by the card's names."""
        if "rope scaling" in self.said:
            found = _rope_of(self.said)
        elif not self.args:
            return _rope_of(self.assumed)
        else:
            found = self._said_scaling()
        self._known |= found
        if found["rope scaling"] not in ("default", "linear", "llama3"):
            raise UserError(f"{self.path}: the reference forward knows no rope scaling {found['rope scaling']!r} here")
        return found

    def _said_scaling(self) -> dict[str, Value]:
        """By the arguments; with Megatron-LM's use_rope_scaling the factor is Llama 3.1's, 8 in its first versions."""
        factor = self.args.get("rope_scaling_factor")
        if self.args.get("use_rope_scaling"):
            return {"rope scaling": "llama3", "rope factor": float(factor or 8)} | _LLAMA3
        llama3_default = "use_rope_scaling" in self.args  # then the factor means nothing
        factor = self.args.get("rotary_seq_len_interpolation_factor") or (None if llama3_default else factor)
        return {"rope scaling": "linear", "rope factor": float(factor)} if factor not in (None, 1) else dict(_PLAIN)


_PLAIN: dict[str, Value] = {"rope scaling": "default"}


def _rope_of(settings: Mapping[str, Value]) -> dict[str, Value]:
    """The scaling's rows of the hyper-parameters."""
    return _PLAIN | {
        name: value for name, value in settings.items() if name.startswith("rope ") and name != "rope theta"
    }

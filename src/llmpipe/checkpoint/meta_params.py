"""params.json, Meta's hyper-parameters: made from a shape, and what of a shape it cannot say.

Meta's own code (meta-llama/llama, codellama, llama3, llama-models) computes the MLP's size: int(2 · 4·dim / 3), times
ffn_dim_multiplier and truncated where that key is there, then up to the next multiple of multiple_of. Left out where
they are its defaults: n_kv_heads (n_heads), rope_theta (1e4; Llama 3's code: 5e5). use_scaled_rope stands for one
scaling alone, Llama 3.1's. What it does not say: the longest sequence, and that the head is the embedding.
"""

import logging
import math
from typing import Any

from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape

log = logging.getLogger(__name__)

# multiple_of and ffn_dim_multiplier of Meta's releases: Llama 1 and 2, 3.2 1B, 2 70B, 3 8B, 3.1 405B.
_RELEASED = ((256, None), (256, 1.5), (4096, 1.3), (1024, 1.3), (4096, 1.2))
_SCALED = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SCALED |= {"original_max_position_embeddings": 8192}
_FACTOR = 8.0
# Llama 3's vocabulary is 128256; its embedding is split by rows, that of 1 and 2 by columns.
_LLAMA3_VOCAB = 128000


def by_rows(shape: Shape) -> bool:
    """Whether Meta's files of such a model split the embedding by rows (Llama 3) or by columns (1 and 2)."""
    return shape.vocab >= _LLAMA3_VOCAB


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The MLP's size as Meta's code computes it."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def ffn_params(dim: int, ffn: int) -> dict[str, Any]:
    """multiple_of and, where needed, ffn_dim_multiplier that give an MLP's size: a release's, else the shortest."""
    multiple_of, multiplier = next(
        (pair for pair in _RELEASED if ffn_size(dim, *pair) == ffn), (math.gcd(ffn, 256), None)
    )
    if ffn_size(dim, multiple_of, multiplier) != ffn:
        exact = (ffn + 0.5) / int(2 * (4 * dim) / 3)  # the half: truncation must not take it below
        cut = (math.floor(exact * 10**digits) / 10**digits for digits in range(1, 17))
        multiplier = next(short for short in cut if ffn_size(dim, multiple_of, short) == ffn)
    return {"multiple_of": multiple_of} | ({} if multiplier is None else {"ffn_dim_multiplier": multiplier})


def to_params(shape: Shape, rows: bool) -> dict[str, Any]:
    """params.json; `rows`: as Llama 3's code reads it. UserError for what Meta's format cannot say."""
    check(shape)
    params: dict[str, Any] = {"dim": shape.hidden, "n_layers": shape.num_layers, "n_heads": shape.num_heads}
    if shape.num_kv_heads != shape.num_heads:
        params["n_kv_heads"] = shape.num_kv_heads
    params |= {"vocab_size": shape.vocab, **ffn_params(shape.hidden, shape.ffn), "norm_eps": shape.norm_eps}
    if rows or shape.rope_theta != 1e4:
        params["rope_theta"] = shape.rope_theta
    return params | _scaled_rope(shape)


def _scaled_rope(shape: Shape) -> dict[str, Any]:
    """Llama 3.1's scaling; 3.2's, which Meta's own params.json does not tell from it, with a key of Llama 4's code."""
    if shape.rope_scaling is None:
        return {}
    factor = float(shape.rope_scaling["factor"])
    if factor == _FACTOR:
        return {"use_scaled_rope": True}
    log.warning(
        "params.json: the rope scaling's factor %g stands in rope_scaling_factor, as in Llama 4's: Meta's code for"
        " Llama 3 does not read it and takes %g, as it does for Llama 3.2",
        factor,
        _FACTOR,
    )
    return {"use_scaled_rope": True, "rope_scaling_factor": factor}


def check(shape: Shape) -> None:
    """UserError, with each reason, for a model that Meta's format cannot say."""
    family = FAMILIES[shape.family]
    scaling = {key: value for key, value in (shape.rope_scaling or _SCALED).items() if key != "factor"}
    cannot = {
        f"the {family.name} family's norms and MLP": family.norm != "rms" or family.mlp != "swiglu" or family.parallel,
        "biases": shape.qkv_bias or shape.output_bias or shape.mlp_bias,
        "norms of q and k": shape.qk_norm,
        f"a window of {shape.window} tokens": shape.window is not None,
        f"heads of {shape.head_dim}, not hidden / num_heads": shape.head_dim * shape.num_heads != shape.hidden,
        f"rope scaling {shape.rope_scaling}, other than Llama 3.1's": scaling != _SCALED,
    }
    found = [what for what, there in cannot.items() if there]
    if found:
        raise UserError(f"Meta's format cannot say what this model has: {'; '.join(found)}: convert with --to hf")

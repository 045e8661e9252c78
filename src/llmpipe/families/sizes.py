"""One row of a family's size table, compact enough for the tables to be read as tables."""

from typing import Any

from llmpipe.families.family import Shape


def sized(family: str, num_layers: int, hidden: int, num_heads: int, num_kv_heads: int, ffn: int, **more: Any) -> Shape:
    """A shape by the numbers that tell sizes apart; what `more` leaves out is as in Llama 2."""
    fields: dict[str, Any] = {"head_dim": hidden // num_heads, "vocab": 32000, "max_positions": 4096}
    fields |= {"norm_eps": 1e-5, "rope_theta": 1e4} | more
    return Shape(
        family=family,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        ffn=ffn,
        **fields,
    )

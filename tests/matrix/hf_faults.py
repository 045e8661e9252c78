"""Faults in a checkpoint, as a wrong converter would leave them. Each alters a draft; False: it does not apply."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpipe.verify.compare import probe

LAYER = "model.layers.2."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(slots=True)
class Draft:
    """A checkpoint's directory, before it is signed."""

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config.get("num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.heads

    @property
    def rope(self) -> dict[str, Any]:
        """The rotary settings, where they stand."""
        if "rope_parameters" not in self.config:
            scaling = self.config.pop("rope_scaling", None) or {"rope_type": "default"}
            self.config["rope_parameters"] = {"rope_theta": self.config.pop("rope_theta", 1e4)} | scaling
        return self.config["rope_parameters"]

    def each(self, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Change every tensor with this in its name."""
        names = [name for name in self.tensors if part in name]
        for name in names:
            self.tensors[name] = change(self.tensors[name]).contiguous()
        return bool(names)

    def swap(self, one: str, other: str) -> bool:
        """Swap two tensors of one size."""
        tensors = self.tensors
        if one not in tensors or other not in tensors or tensors[one].shape != tensors[other].shape:
            return False
        tensors[one], tensors[other] = tensors[other], tensors[one]
        return True


Fault = Callable[[Draft], bool | None]


def neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from half after half to neighbours: as Meta stores them."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The permute of the published conversion script."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def swapped_rows(tensor: torch.Tensor, one: slice, other: slice) -> torch.Tensor:
    made = tensor.clone()
    made[one], made[other] = tensor[other], tensor[one]
    return made


def _heads(tensor: torch.Tensor, size: int, one: int, other: int) -> torch.Tensor:
    return swapped_rows(tensor, slice(one * size, (one + 1) * size), slice(other * size, (other + 1) * size))


def _halves_swapped(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    half = (tensor.shape[dim] + 1) // 2
    return torch.cat([tensor.narrow(dim, half, tensor.shape[dim] - half), tensor.narrow(dim, 0, half)], dim)


def _both(draft: Draft, change: Callable[[torch.Tensor, int], torch.Tensor]) -> bool:
    q = draft.each("q_proj.weight", lambda x: change(x, draft.heads))
    return draft.each("k_proj.weight", lambda x: change(x, draft.kv_heads)) and q


def _k_with_q_heads(draft: Draft) -> bool:
    if draft.heads == draft.kv_heads:
        return False
    return draft.each("k_proj.weight", lambda x: halves(neighbours(x, draft.kv_heads), draft.heads))


def _one_layer(*parts: str) -> Fault:
    return lambda draft: draft.swap(*(f"{LAYER}{part}" for part in parts))


def _two_layers(draft: Draft) -> bool:
    names = [name for name in draft.tensors if ".layers.1." in name]
    return all(draft.swap(name, name.replace(".1.", ".3.", 1)) for name in names)


def _two_ranks_of_gate_up(draft: Draft) -> None:
    """[gate 0; up 0] and [gate 1; up 1] of two ranks joined, then cut as if they were one."""
    names = [f"{LAYER}mlp.{part}_proj.weight" for part in ("gate", "up")]
    (gate0, gate1), (up0, up1) = (draft.tensors[name].chunk(2) for name in names)
    draft.tensors |= dict(zip(names, (torch.cat([gate0, up0]), torch.cat([gate1, up1])), strict=True))


def _groups_as_blocks(draft: Draft) -> bool:
    """Megatron's rows, group by group, read as all of q, all of k, all of v."""
    names = [f"{LAYER}self_attn.{part}_proj.weight" for part in "qkv"]
    parts = [draft.tensors[name].chunk(draft.kv_heads) for name in names]
    fused = torch.cat([torch.cat(group) for group in zip(*parts, strict=True)])
    cut = fused.split([len(draft.tensors[name]) for name in names])
    draft.tensors |= {name: part.contiguous() for name, part in zip(names, cut, strict=True)}
    return True


def _head_counts(draft: Draft) -> bool:
    """Half as many heads, each twice as wide: every size fits."""
    if draft.kv_heads % 2:
        return False
    draft.config |= {"num_attention_heads": draft.heads // 2, "num_key_value_heads": draft.kv_heads // 2,
                     "head_dim": draft.head_dim * 2}  # fmt: skip
    return not any("q_norm" in name for name in draft.tensors)


def _kv_heads(draft: Draft) -> bool:
    draft.config["num_key_value_heads"] = draft.kv_heads * 2 if draft.kv_heads < draft.heads else draft.heads // 2
    return True


def _config(**values: Any) -> Fault:
    return lambda draft: draft.config.update(values)


def _rope(**values: Any) -> Fault:
    return lambda draft: draft.rope.update(values)


def _factor(draft: Draft) -> bool:
    if "factor" not in draft.rope:
        return False
    draft.rope["factor"] *= 2
    return True


def _no_scaling(draft: Draft) -> bool:
    scaled = draft.rope["rope_type"] != "default"
    draft.config["rope_parameters"] = {"rope_type": "default", "rope_theta": draft.rope["rope_theta"]}
    return scaled


def _linear(draft: Draft) -> bool:
    if draft.rope["rope_type"] in ("default", "linear"):
        return False
    rope = {"rope_type": "linear", "rope_theta": draft.rope["rope_theta"], "factor": draft.rope["factor"]}
    draft.config["rope_parameters"] = rope
    return True


def _window(change: Callable[[int], int | None]) -> Fault:
    def fault(draft: Draft) -> bool:
        window = draft.config.get("sliding_window")
        draft.config["sliding_window"] = window and change(window)
        draft.config.pop("layer_types", None)
        draft.config |= {"use_sliding_window": False} if window and change(window) is None else {}
        return bool(window)

    return fault


def _window_from(draft: Draft) -> bool:
    if not draft.config.get("use_sliding_window"):
        return False
    draft.config["max_window_layers"] += 1
    draft.config.pop("layer_types", None)
    return True


def _less_one(draft: Draft) -> bool:
    return draft.each("norm.weight", lambda x: x - 1)


def _padded(draft: Draft) -> None:
    for name in (EMBEDDING, HEAD):
        if name in draft.tensors:
            rows = draft.tensors[name]
            draft.tensors[name] = torch.cat([rows, rows[-1:].expand(-len(rows) % 128, -1)])
    draft.config["vocab_size"] = len(draft.tensors[EMBEDDING])


def _cut(draft: Draft) -> None:
    for name in (EMBEDDING, HEAD):
        if name in draft.tensors:
            draft.tensors[name] = draft.tensors[name][:-1].contiguous()
    draft.config["vocab_size"] -= 1


def _wrongly_tied(draft: Draft) -> bool:
    draft.config["tie_word_embeddings"] = True
    return draft.tensors.pop(HEAD, None) is not None


def _lost_head(draft: Draft) -> bool:
    if HEAD in draft.tensors:
        return False
    draft.tensors[HEAD] = torch.zeros_like(draft.tensors[EMBEDDING])
    draft.config["tie_word_embeddings"] = False
    return True


def _untied_copy(draft: Draft) -> bool:
    """The same arithmetic until it is trained."""
    if HEAD in draft.tensors:
        return False
    draft.tensors[HEAD] = draft.tensors[EMBEDDING].clone()
    draft.config["tie_word_embeddings"] = False
    return True


def _bit(draft: Draft) -> None:
    """The lowest bit of the smallest element."""
    tensor = draft.tensors[f"{LAYER}mlp.down_proj.weight"]
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).flatten()
    bits[int(tensor.abs().flatten().argmin())] ^= 1


def _truncated(draft: Draft) -> bool:
    """bf16 by cutting bits off instead of rounding to the nearest, ties to even."""
    if any(tensor.dtype != torch.float32 for tensor in draft.tensors.values()):
        return False
    draft.config["torch_dtype"] = draft.config["dtype"] = "bfloat16"
    return draft.each("", lambda x: (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


def _other_step(draft: Draft) -> bool:
    """The second half of every matrix's rows, rank 1's, has moved on; in bf16 by too little to change a bit."""
    before = dict(draft.tensors)
    draft.each("_proj.weight", lambda x: torch.cat([x.chunk(2)[0], x.chunk(2)[1] * 1.001]))
    return any(not torch.equal(before[name], tensor) for name, tensor in draft.tensors.items())


def _set(name: str, value: float, row: int = 0) -> Fault:
    def fault(draft: Draft) -> None:
        draft.tensors[name][row, 1] = value

    return fault


def _unused(draft: Draft) -> list[int]:
    """Rows of the embedding that the probe does not read."""
    vocab = draft.config["vocab_size"]
    rows = [probe(vocab, length)[0] for length in (512, 4096)]
    return sorted(set(range(vocab)) - set(torch.stack(rows).flatten().tolist()))


def _unread_rows(draft: Draft) -> bool:
    unused = _unused(draft)[:2]
    if len(unused) == 2:
        draft.tensors[EMBEDDING] = _heads(draft.tensors[EMBEDDING], 1, *unused)
    return len(unused) == 2


def _unread_nan(draft: Draft) -> bool:
    unused = _unused(draft)[:1]
    for row in unused:
        draft.tensors[EMBEDDING][row, 1] = float("nan")
    return bool(unused)


def _no_last_layer(draft: Draft) -> None:
    last = draft.config["num_hidden_layers"] - 1
    draft.tensors = {name: tensor for name, tensor in draft.tensors.items() if f".layers.{last}." not in name}
    draft.config["num_hidden_layers"] = last
    draft.config.pop("layer_types", None)


def _tokenizer(draft: Draft) -> bool:
    file = draft.path / "tokenizer.model"
    if file.is_file():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    return file.is_file()


def _special_ids(draft: Draft) -> bool:
    bos, eos = draft.config.get("bos_token_id"), draft.config.get("eos_token_id")
    draft.config |= {"bos_token_id": eos, "eos_token_id": bos}
    return bos != eos


def _gone(name: str) -> Fault:
    return lambda draft: draft.tensors.pop(name, None) is not None


FAULTS: dict[str, Fault] = {
    "rotary permute left out, q and k": lambda draft: _both(draft, neighbours),
    "rotary permute left out, q": lambda draft: draft.each("q_proj.weight", lambda x: neighbours(x, draft.heads)),
    "rotary permute left out, k": lambda draft: draft.each("k_proj.weight", lambda x: neighbours(x, draft.kv_heads)),
    "rotary permute doubled, q and k": lambda draft: _both(draft, halves),
    "rotary permute doubled, q": lambda draft: draft.each("q_proj.weight", lambda x: halves(x, draft.heads)),
    "rotary permute doubled, k": lambda draft: draft.each("k_proj.weight", lambda x: halves(x, draft.kv_heads)),
    "rotary permute left out in one layer": lambda draft: draft.each(
        f"{LAYER}self_attn.q_proj.weight", lambda x: neighbours(x, draft.heads)),
    "k permuted with q's head count": _k_with_q_heads,
    "v permuted": lambda draft: draft.each("v_proj.weight", lambda x: halves(x, draft.kv_heads)),
    "q and k swapped": _one_layer("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "k and v swapped": _one_layer("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "gate and up swapped": _one_layer("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate and up of two ranks joined as one": _two_ranks_of_gate_up,
    "groups of q, k, v read as blocks": _groups_as_blocks,
    "norms of a layer swapped": _one_layer("input_layernorm.weight", "post_attention_layernorm.weight"),
    "two layers swapped": _two_layers,
    "last layer lost": _no_last_layer,
    "embedding and head swapped": lambda draft: draft.swap(EMBEDDING, HEAD),
    "two query heads swapped": lambda draft: draft.each(
        f"{LAYER}self_attn.q_proj.weight", lambda x: _heads(x, draft.head_dim, 0, 1)),
    "two KV heads of k swapped": lambda draft: draft.each(
        f"{LAYER}self_attn.k_proj.weight", lambda x: _heads(x, draft.head_dim, 0, 1)),
    "matrix transposed": lambda draft: draft.each(f"{LAYER}self_attn.o_proj.weight", lambda x: x.T)
    and draft.tensors[f"{LAYER}self_attn.o_proj.weight"].shape[0] == draft.config["hidden_size"],
    "columns of two ranks swapped, o": lambda draft: draft.each("o_proj.weight", lambda x: _halves_swapped(x, 1)),
    "columns of two ranks swapped, down": lambda draft: draft.each("down_proj.weight", lambda x: _halves_swapped(x, 1)),
    "rows of two ranks swapped, embedding": lambda draft: draft.each(EMBEDDING, lambda x: _halves_swapped(x, 0)),
    "rows of two ranks swapped, head": lambda draft: draft.each(HEAD, lambda x: _halves_swapped(x, 0)),
    "rows of two tokens swapped that the probe does not read": _unread_rows,
    "one rank's weights of another step": _other_step,
    "wrong head counts that fit every size": _head_counts,
    "wrong KV head count": _kv_heads,
    "theta": _rope(rope_theta=12345.0),
    "theta by 1 in 10 million": lambda draft: draft.rope.update(rope_theta=draft.rope["rope_theta"] * (1 + 1e-7)),
    "norm eps": _config(rms_norm_eps=1e-6),
    "rope scaling dropped": _no_scaling,
    "rope scaling's factor": _factor,
    "rope scaling of another kind": _linear,
    "rope scaling that is none of the source's": lambda draft: draft.rope["rope_type"] == "default"
    and draft.rope.update(rope_type="linear", factor=2.0) is None,
    "window dropped": _window(lambda size: None),
    "window larger by one": _window(lambda size: size + 1),
    "window from the next layer on": _window_from,
    "longest sequence": lambda draft: draft.config.update(
        max_position_embeddings=2 * draft.config["max_position_embeddings"]),
    "biases dropped (zeros)": lambda draft: draft.each("_proj.bias", torch.zeros_like),
    "biases of k and v swapped": _one_layer("self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "norms of q and k swapped": _one_layer("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
    "norm's missing 1 not added": _less_one,
    "padded rows kept": _padded,
    "vocabulary cut by one row": _cut,
    "head tied that is not": _wrongly_tied,
    "tied head lost, zeros in its place": _lost_head,
    "tied head stored as one of its own": _untied_copy,
    "lowest bit of the smallest element flipped": _bit,
    "bf16 truncated, not rounded": _truncated,
    "one value NaN": _set(EMBEDDING, float("nan"), row=130),
    "one value infinite": _set(f"{LAYER}mlp.up_proj.weight", float("inf")),
    "NaN in a row that the probe does not read": _unread_nan,
    "tensor lost": _gone(f"{LAYER}mlp.up_proj.weight"),
    "tensor left over": lambda draft: draft.tensors.update({f"{LAYER}mlp.more.weight": torch.ones(3, 3)}),
    "tokenizer.model changed by one bit": _tokenizer,
    "special ids swapped": _special_ids,
}  # fmt: skip
# Of Falcon's own names: fused q, k and v, LayerNorm.
_FUSED, _FALCON = "self_attention.query_key_value.weight", "transformer.h.1."


def _falcon_groups(draft: Draft, change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Change the rows of every KV group, (groups, queries + 2, D, C)."""
    groups = draft.config.get("num_kv_heads") if draft.config.get("new_decoder_architecture") else 1
    size = draft.config["hidden_size"] // draft.heads
    return draft.each(_FUSED, lambda x: change(x.unflatten(0, (groups, -1, size))).flatten(0, 2))


def _falcon_permute(draft: Draft) -> bool:
    def turn(x: torch.Tensor) -> torch.Tensor:
        turned = x.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3)
        return torch.cat([turned[:, :-1], x[:, -1:]], 1)

    return _falcon_groups(draft, turn) and draft.config["hidden_size"] // draft.heads > 2


def _falcon_kv_heads(draft: Draft) -> bool:
    draft.config["num_kv_heads"] = draft.config.get("num_kv_heads", 1) * 2
    return bool(draft.config.get("new_decoder_architecture"))


FALCON_FAULTS: dict[str, Fault] = {
    "rotary permute left out, q and k": _falcon_permute,
    "k and v swapped": lambda draft: _falcon_groups(draft, lambda x: x[:, [*range(x.shape[1] - 2), -1, -2]]),
    "groups of q, k, v read as blocks": lambda draft: _falcon_groups(
        draft, lambda x: x.transpose(0, 1).reshape(x.shape)) and draft.config.get("new_decoder_architecture"),
    "norms of a layer swapped": lambda draft: draft.swap(f"{_FALCON}ln_attn.weight", f"{_FALCON}ln_mlp.weight"),
    "norm's weight and bias swapped": lambda draft: draft.swap("transformer.ln_f.weight", "transformer.ln_f.bias"),
    "two layers swapped": lambda draft: all(draft.swap(name, name.replace("h.0.", "h.1."))
                                            for name in list(draft.tensors) if ".h.0." in name),
    "wrong KV head count": _falcon_kv_heads,
    "norm eps": _config(layer_norm_epsilon=1e-4),
    "theta": _rope(rope_theta=12345.0),
    "columns of two ranks swapped, down": lambda draft: draft.each("4h_to_h.weight", lambda x: _halves_swapped(x, 1)),
    "tied head lost, zeros in its place": lambda draft: draft.tensors.update({
        HEAD: torch.zeros_like(draft.tensors["transformer.word_embeddings.weight"])})
    or draft.config.update(tie_word_embeddings=False),
    "lowest bit of the smallest element flipped": lambda draft: draft.each(
        f"{_FALCON}mlp.dense_4h_to_h.weight", lambda x: (x.view(torch.int32) ^ (x == x.abs().min())).view(x.dtype)),
}  # fmt: skip

"""config.json of transformers 4 and 5, read into a `Shape` and written back; an unknown key is an error.

Every family's keys, defaults and settings that the decoder computes in one value only are in its table.
"""

from typing import Any

from llmpipe.errors import UserError
from llmpipe.families.family import Family, Shape
from llmpipe.families.rope_config import ROPE_KEYS, read_rope, write_rope

# Neither sizes nor settings of the arithmetic: names, tokens, training, generation, how others keep or run a model.
_IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cls_token_id", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range",
    "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty", "mask_token_id", "max_length",
    "max_sequence_length", "max_window_layers", "min_length", "model_max_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_scores", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unk_token_id", "use_bfloat16", "use_cache", "use_flash_attn",
}  # fmt: skip
# Settings that are in real files with the one value in which they change nothing.
_NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False, "attention_bias": False, "bias": False, "is_decoder": False,
    "is_encoder_decoder": False, "mlp_bias": False, "pruned_heads": {}, "rope_interleaved": False,
    "tie_encoder_decoder": False, "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32", "float64", "auto")
# Read apart from the families' tables, in `_window` and `_falcon`.
_WINDOW = {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}
_FALCON = {"multi_query", "new_decoder_architecture", "num_ln_in_parallel_attn"}
# Falcon's first config.json files.
_OLD_NAMES = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_layer": "num_hidden_layers"}


def read_config(family: Family, config: dict[str, Any], where: str) -> Shape:
    """The shape that a family's config.json describes; UserError for what the decoder would not carry."""
    given = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    for key, value in family.only.items():
        if given.get(key, value) not in (value, None):
            raise UserError(f"{where}: {key} is {given[key]!r}, but llmpipe computes with {key} {value!r} only")
    fields = {name: given[key] for name, key in family.config.items() if key in given and _is_said(name, given[key])}
    fields = family.defaults | fields | family.fixed
    try:
        fields |= _derived(family, fields, given) | _window(family, given, fields["num_layers"], where)
        shape = Shape(family=family.name, **fields, **read_rope(given, where))
    except KeyError as error:
        raise UserError(f"{where}: the key {family.config[error.args[0]]!r} is missing") from error
    except (TypeError, ZeroDivisionError, UserError) as error:
        if where in str(error):
            raise
        missing = sorted(key for name, key in family.config.items() if name not in fields)
        raise UserError(
            f"{where}: {error}{', missing: ' + ', '.join(missing) if missing else ''}: copy or download it again"
        ) from error
    _check_others(given, where)
    known = {*family.config.values(), *family.only, *_IGNORED, *_FALCON, *ROPE_KEYS, "head_dim"}
    known |= _WINDOW if family.windowed else set()
    left = {key: value for key, value in given.items() if key not in known and value is not None}
    if unknown := sorted(key for key, value in left.items() if not _is_neutral(key, value, fields)):
        raise UserError(f"{where}: keys that llmpipe does not know and would lose: {', '.join(unknown)}")
    return shape


def _is_said(field: str, value: Any) -> bool:
    """null is a default where transformers takes it for one."""
    return value is not None or field in ("norm_eps", "max_positions")


def _check_others(config: dict[str, Any], where: str) -> None:
    """UserError for what is carried as it is, and would keep transformers from opening the checkpoint."""
    for key in ("dtype", "torch_dtype"):
        if config.get(key) not in (None, *_DTYPES):
            raise UserError(f"{where}: {key} is {config[key]!r}, expected one of {', '.join(_DTYPES)}: correct it")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(key)
        if not all(type(number) is int for number in (ids if isinstance(ids, list) else [ids]) if number is not None):
            raise UserError(f"{where}: {key} is {ids!r}, expected a token's number, or a list of such: correct it")


def _is_neutral(key: str, value: Any, fields: dict[str, Any]) -> bool:
    """Whether a setting that the family's table does not have changes nothing."""
    if key == "ff_factor":  # Falcon 11B's, which transformers does not read
        return type(value) is int and value * fields["hidden"] == fields["ffn"]
    if key == "layer_types":
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    return key.startswith("unsloth_") or (key in _NEUTRAL and value == _NEUTRAL[key])


def write_config(family: Family, shape: Shape, dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json for a shape; `dtype` as torch names it (bfloat16). Old and new readers find their rope keys."""
    sizes = {key: getattr(shape, name) for name, key in family.config.items()}
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **sizes,
        **_window_keys(family, shape),
        **(_falcon_keys(shape) if family.parallel else {}),
        **write_rope(shape),
        **family.only,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def _derived(family: Family, fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Fields that config.json may leave out because they follow from others."""
    num_heads, hidden = fields["num_heads"], fields["hidden"]
    found = {"head_dim": hidden // num_heads, "num_kv_heads": num_heads} | fields
    if family.parallel:
        found |= {"ffn": found.get("ffn", 4 * hidden)} | _falcon(found, given)
    return found


def _falcon(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Which of Falcon's two architectures: it says how many norms a layer has, and whether KV heads are counted."""
    if given.get("new_decoder_architecture") or given.get("model_type") == "RefinedWeb":  # 40B's first config.json
        return {"layer_norms": given.get("num_ln_in_parallel_attn") or 2}
    return {"layer_norms": 1, "num_kv_heads": 1 if given.get("multi_query", True) else fields["num_heads"]}


def _falcon_keys(shape: Shape) -> dict[str, Any]:
    new = shape.layer_norms == 2 or shape.num_kv_heads not in (1, shape.num_heads)
    keys = {"new_decoder_architecture": new, "multi_query": shape.num_kv_heads == 1}
    return keys | ({"num_ln_in_parallel_attn": shape.layer_norms} if new else {})


def _window(family: Family, given: dict[str, Any], num_layers: int, where: str) -> dict[str, Any]:
    """The sliding window and the first layer that has it; transformers 5 lists every layer's kind beside."""
    if not family.windowed:
        return {}
    on = given.get("use_sliding_window", False) if family.window_switch else True
    window = given.get("sliding_window", 4096) if on else None
    first = given.get("max_window_layers", 28) if family.window_switch and window else 0
    full = num_layers if window is None else min(first, num_layers)
    kinds = ["full_attention"] * full + ["sliding_attention"] * (num_layers - full)
    if given.get("layer_types") not in (None, kinds):
        raise UserError(f"{where}: layer_types {given['layer_types']} is not what sliding_window and its switches say")
    return {"window": window, "window_from": first and full}


def _window_keys(family: Family, shape: Shape) -> dict[str, Any]:
    if not family.windowed:
        return {}
    switch = {"use_sliding_window": shape.window is not None, "max_window_layers": shape.window_from}
    return {"sliding_window": shape.window} | (switch if family.window_switch else {})

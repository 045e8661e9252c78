"""config.json: as published, as transformers 4 and 5 write it, and back; what would be lost is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config, named_size, to_hf_config

COMMON = {"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
LLAMA: dict[str, Any] = COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
LLAMA3 = LLAMA | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "vocab_size": 128256,
}  # fmt: skip
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN2: dict[str, Any] = COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "model_type": "qwen2", "rope_theta": 1000000.0, "use_sliding_window": False,
}  # fmt: skip
FALCON: dict[str, Any] = COMMON | {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"}, "bos_token_id": 11, "eos_token_id": 11,
    "hidden_dropout": 0.0, "layer_norm_epsilon": 1e-05, "parallel_attn": True, "vocab_size": 65024,
}  # fmt: skip
# The files as the hub has them, without the keys of COMMON.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama_7b": LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 2048, "max_sequence_length": 2048, "num_attention_heads": 32,
        "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "transformers_version": "4.28.0.dev0", "vocab_size": 32000,
    },
    "codellama_7b": LLAMA | {
        "_name_or_path": "codellama/CodeLlama-7b-hf", "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 16384, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 1000000, "tie_word_embeddings": False, "vocab_size": 32016,
    },
    "llama3_8b": LLAMA3 | {"eos_token_id": 128001, "max_position_embeddings": 8192, "rope_scaling": None},
    "llama3_1_8b": LLAMA3 | {
        "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
        "rope_scaling": {"factor": 8.0, "rope_type": "llama3"} | SCALING,
    },
    "llama3_2_1b": LLAMA3 | {
        "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_hidden_layers": 16,
        "rope_scaling": {"factor": 32.0, "rope_type": "llama3"} | SCALING, "tie_word_embeddings": True,
    },
    "yi_6b": LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 5000000.0, "tie_word_embeddings": False, "vocab_size": 64000,
    },
    "mistral_7b_v01": COMMON | {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "mistral_7b_v03": COMMON | {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "qwen2_7b": QWEN2 | {
        "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "qwen2_5_72b_instruct": QWEN2 | {
        "eos_token_id": 151645, "hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 32768,
        "max_window_layers": 70, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064,
    },
    "qwen3_0_6b": QWEN2 | {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "eos_token_id": 151645, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "vocab_size": 151936,
    },
    # num_kv_heads 71 is in the file, and counts for nothing: the one of multi_query does.
    "falcon_7b": FALCON | {
        "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "model_type": "falcon", "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71,
    },
    "falcon_40b": FALCON | {
        "architectures": ["RWForCausalLM"], "hidden_size": 8192, "model_type": "RefinedWeb", "n_head": 128,
        "n_head_kv": 8, "n_layer": 60,
    },
    "falcon_180b": FALCON | {
        "architectures": ["FalconForCausalLM"], "hidden_size": 14848, "model_type": "falcon", "multi_query": True,
        "new_decoder_architecture": True, "num_attention_heads": 232, "num_hidden_layers": 80, "num_kv_heads": 8,
    },
}  # fmt: skip
BASES = ["llama3_1_8b", "mistral_7b_v01", "qwen2_7b", "qwen3_8b", "falcon_7b", "falcon_40b"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_the_named_size(name: str) -> None:
    assert from_hf_config(PUBLISHED[name]) == named_size(name)


def test_the_first_falcon_7b_config_is_read_too() -> None:
    config = {"architectures": ["RWForCausalLM"], "model_type": "RefinedWebModel", "hidden_size": 4544}
    assert from_hf_config(FALCON | config | {"multi_query": True, "n_head": 71, "n_layer": 32}) == named_size(
        "falcon_7b"
    )


def variants() -> list[Shape]:
    """Every family in its unusual forms: scaled, biased, tied, windowed, heads of their own size."""
    llama, qwen2, qwen3 = named_size("llama2_7b"), named_size("qwen2_7b"), named_size("qwen3_8b")
    falcon = named_size("falcon_40b")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    return [
        *(named_size(name) for name in BASES),
        replace(llama, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        replace(llama, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
        replace(llama, qkv_bias=True, output_bias=True, mlp_bias=True, head_dim=96, tie_embeddings=True),
        replace(named_size("mistral_7b_v01"), window=None, head_dim=96),
        replace(qwen2, window=4096, window_from=14),
        replace(qwen2, window=4096, window_from=0, rope_scaling=yarn),
        replace(qwen3, window=1024, window_from=30, qkv_bias=True, output_bias=True),
        replace(falcon, num_kv_heads=1, tie_embeddings=False),
        replace(falcon, layer_norms=1, ffn=16384),
        replace(named_size("falcon_7b"), num_kv_heads=71, norm_eps=1e-6),
    ]


def written_by_transformers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What transformers 5 makes of a config.json when it writes it again."""
    AutoConfig.for_model(**config).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("shape", variants(), ids=lambda shape: shape.family)
def test_round_trip_ours_and_transformers_5(shape: Shape, tmp_path: Path) -> None:
    config = to_hf_config(shape, "bfloat16", 1, 2)
    assert from_hf_config(json.loads(json.dumps(config))) == shape
    theirs = written_by_transformers(config, tmp_path)
    assert from_hf_config(theirs) == shape
    # And transformers takes both for the same model.
    assert written_by_transformers(theirs, tmp_path) == theirs


@pytest.mark.parametrize("shape", variants(), ids=lambda shape: shape.family)
def test_transformers_reads_the_same_settings(shape: Shape) -> None:
    theirs = AutoConfig.for_model(**to_hf_config(shape, "bfloat16", 1, 2))
    family = FAMILIES[shape.family]
    for field, key in family.config.items():
        if not (family.name == "falcon" and key == "num_kv_heads" and shape.layer_norms == 1):
            assert getattr(theirs, key) == getattr(shape, field), key
    rope = dict(theirs.rope_parameters)
    assert rope.pop("rope_theta") == shape.rope_theta
    scaling = {key: value for key, value in rope.items() if key in (shape.rope_scaling or {})}
    assert scaling == (shape.rope_scaling or {}) and rope["rope_type"] == scaling.get("rope_type", "default")
    if family.windowed:
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * shape.num_layers
        windows = [shape.window_of(layer) for layer in range(shape.num_layers)]
        assert [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds] == windows


def test_rope_scaling_as_transformers_4_wrote_it() -> None:
    old = PUBLISHED["codellama_7b"] | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert from_hf_config(old).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    both = {"type": "llama3", "rope_type": "llama3", "factor": 8.0} | SCALING
    assert from_hf_config(PUBLISHED["llama3_1_8b"] | {"rope_scaling": both}) == named_size("llama3_1_8b")
    new = {key: value for key, value in PUBLISHED["llama3_1_8b"].items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0} | SCALING
    assert from_hf_config(new) == named_size("llama3_1_8b")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama3_8b", {"logit_scale": 2.0}, "keys that llmpipe does not know and would lose: logit_scale"),
        ("llama3_8b", {"sliding_window": 4096}, "would lose: sliding_window"),
        ("llama3_8b", {"quantization_config": {"bits": 4}}, "would lose: quantization_config"),
        ("llama3_8b", {"hidden_act": "gelu"}, "hidden_act is 'gelu', but llmpipe computes with hidden_act 'silu' only"),
        ("llama3_8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: llmpipe turns whole heads only"),
        ("llama3_8b", {"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ("llama3_1_8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "keys missing: ['low_freq_factor'"),
        ("llama3_8b", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "unknown: ['beta']"),
        ("qwen2_7b", {"layer_types": ["sliding_attention"] * 28}, "is not what sliding_window and its switches say"),
        ("falcon_7b", {"alibi": True}, "alibi is True, but llmpipe computes with alibi False only"),
        ("falcon_7b", {"parallel_attn": False}, "parallel_attn is False"),
        ("falcon_7b", {"bias": True}, "bias is True"),
        ("llama3_8b", {"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM': llmpipe knows Llama"),
        ("llama3_8b", {"hidden_size": None}, "the key 'hidden_size' is missing"),
    ],
)
def test_what_would_be_lost_is_refused(name: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        from_hf_config(PUBLISHED[name] | change, "model/config.json")
    assert str(error.value).startswith("model/config.json: ") and told in str(error.value)


@pytest.mark.parametrize(
    ("change", "window", "first"),
    [
        ({}, None, 0),
        ({"use_sliding_window": True}, 131072, 28),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}, 4096, 21),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, 4096, 0),
    ],
)
def test_windows_of_qwen(change: dict[str, Any], window: int | None, first: int) -> None:
    shape = from_hf_config(PUBLISHED["qwen2_7b"] | change)
    assert [shape.window_of(layer) for layer in range(28)] == [None] * (first if window else 28) + [window] * (
        28 - first if window else 0
    )


def test_a_written_config_shares_nothing_with_the_shape() -> None:
    """transformers writes into the dictionaries that it is given."""
    shape = named_size("llama3_1_8b")
    to_hf_config(shape, "bfloat16", 1, 2)["rope_scaling"]["rope_theta"] = 1.0
    assert named_size("llama3_1_8b").rope_scaling == {"rope_type": "llama3", "factor": 8.0} | SCALING


@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 1024}])
def test_the_original_length_beside_the_scaling_is_taken_before_its_own(inside: dict[str, int]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = PUBLISHED["llama3_8b"] | {
        "original_max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 4.0} | inside
    }  # fmt: skip
    theirs = AutoConfig.for_model(**config)
    LlamaRotaryEmbedding(theirs)
    scaling = from_hf_config(config).rope_scaling
    assert scaling and scaling["original_max_position_embeddings"] == 2048
    assert theirs.rope_parameters == scaling | {"rope_theta": 500000.0}

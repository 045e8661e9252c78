"""config.json as published: every one opens, and says to us what it says to transformers."""

from typing import Any

import pytest
from published import CONFIGS, FIRST, OTHERS
from transformers import AutoConfig

from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, from_hf_config, named_size


def assert_as_transformers_reads_it(shape: Shape, theirs: Any) -> None:
    family = FAMILIES[shape.family]
    one_head = family.name == "falcon" and not theirs.new_decoder_architecture
    assert shape.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    for field, key in family.config.items():
        if field != "head_dim" and not (one_head and key == "num_kv_heads"):
            assert getattr(theirs, key) == getattr(shape, field), key
    rope = {key: value for key, value in theirs.rope_parameters.items() if value is not None and key != "type"}
    assert rope == {"rope_theta": shape.rope_theta, "rope_type": "default"} | (shape.rope_scaling or {})
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * shape.num_layers
    window = getattr(theirs, "sliding_window", None)
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [shape.window_of(layer) for layer in range(shape.num_layers)] == windows


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_read_as_transformers_reads_them(name: str) -> None:
    assert_as_transformers_reads_it(from_hf_config(CONFIGS[name]), AutoConfig.for_model(**CONFIGS[name]))


@pytest.mark.parametrize("name", FIRST)
def test_the_first_files_are_the_named_sizes(name: str) -> None:
    assert from_hf_config(FIRST[name]) == named_size(name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_decoder_does_not_compute_is_refused_by_name(name: str) -> None:
    config, told = OTHERS[name]
    with pytest.raises(UserError, match=r"model/config\.json: ") as error:
        from_hf_config(config, "model/config.json")
    assert told in str(error.value)


def test_without_architectures_the_model_type_counts() -> None:
    config = CONFIGS["Qwen/Qwen2.5-3B"]
    assert from_hf_config(config | {"architectures": None}) == from_hf_config(config)
    with pytest.raises(UserError, match="architecture 'none': llmpipe knows LlamaForCausalLM"):
        from_hf_config(config | {"architectures": None, "model_type": None})


THETA = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(("change", "told"), [
    ({"rope_theta": 5e5, "rope_parameters": THETA}, "rope_theta is 500000.0, rope_parameters.rope_theta is 10000.0: "),
    ({"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": THETA}, "rope_scaling.rope_theta is 500000.0, rope_par"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": THETA}, "'factor': 2.0} contradicts rope_"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
     "contradicts rope_parameters"),
    ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}, "says both dynamic and linear"),
    ({"rope_scaling": ["linear", 2.0]}, "rope_scaling is ['linear', 2.0], no table of keys"),
])  # fmt: skip
def test_rotary_settings_that_contradict_each_other_are_refused(change: dict[str, Any], told: str) -> None:
    config = CONFIGS["lmsys/vicuna-7b-v1.5"]
    with pytest.raises(UserError) as error:
        from_hf_config(config | change)
    assert told in str(error.value)


@pytest.mark.parametrize("change", [
    {"rope_theta": 10000, "rope_parameters": THETA},
    {"rope_scaling": None, "rope_parameters": THETA},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": THETA},
    {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0},
     "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
])  # fmt: skip
def test_rotary_settings_said_twice_alike_are_taken(change: dict[str, Any]) -> None:
    config = CONFIGS["lmsys/vicuna-7b-v1.5"] | change
    assert_as_transformers_reads_it(from_hf_config(config), AutoConfig.for_model(**config))

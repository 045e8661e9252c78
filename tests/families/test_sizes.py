"""The size tables: as many parameters as were published, and the names and shapes of transformers' own models."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from llmpipe.families import FAMILIES, named_size, to_hf_config

ROOT = Path(__file__).parents[2]
NAMES = [name for family in FAMILIES.values() for name in family.sizes]
# What the hub counts in each model's safetensors, or the model's paper; Falcon's head counted once.
PUBLISHED = {
    "llama_7b": 6_738_415_616, "llama_13b": 13_015_864_320, "llama_30b": 32_528_943_616, "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616, "llama2_13b": 13_015_864_320, "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688, "codellama_34b": 33_743_970_304, "codellama_70b": 68_976_910_336,
    "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496, "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400, "llama3_2_3b": 3_212_749_824,
    "mistral_7b_v01": 7_241_732_096, "mistral_7b_v03": 7_248_023_552,
    "falcon_7b": 6_921_720_704, "falcon_40b": 41_303_293_952,
    "yi_6b": 6_061_035_520, "yi_9b": 8_829_407_232, "yi_34b": 34_388_917_248, "open_llama_3b": 3_426_473_600,
    "qwen2_0_5b": 494_032_768, "qwen2_72b": 72_706_203_648,
    "qwen2_5_1_5b": 1_543_714_304, "qwen2_5_3b": 3_085_938_688, "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664, "qwen2_5_32b": 32_763_876_352,
    "qwen3_0_6b": 596_049_920, "qwen3_1_7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters_is_the_published_one(name: str) -> None:
    shape = named_size(name)
    assert FAMILIES[shape.family].num_parameters(shape) == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_each_size_has_its_model_file_and_is_in_the_docs(name: str) -> None:
    written = yaml.safe_load((ROOT / f"config/models/{name}.yaml").read_text())
    assert written["shape"] == name
    assert f"`{name}`" in (ROOT / "docs/models.md").read_text()
    assert f"results/models/{name}/source" in " ".join((ROOT / f"config/models/{name}.yaml").read_text().split())


def test_the_docs_promise_no_other_size() -> None:
    page = (ROOT / "docs/models.md").read_text().partition("## Without a row")[0]
    promised = set(re.findall(r"`([a-z]+\w*?_[0-9_]+b\w*)`", page))
    assert promised == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_has_the_same_tensors(name: str) -> None:
    shape = named_size(name)
    family = FAMILIES[shape.family]
    config = AutoConfig.for_model(**to_hf_config(shape, "bfloat16", 1, 2))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    assert theirs == expected_names(family, shape)


def expected_names(family, shape) -> dict[str, tuple[int, ...]]:
    """By the checkpoint's names; the parts of a fused tensor's rows are added."""
    found: dict[str, tuple[int, ...]] = {}
    for key, tensor in family.keys(shape).items():
        name, size = family.hf_name(key, shape), tensor.shape(shape)
        found[name] = (found[name][0] + size[0], *size[1:]) if name in found else size
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_size_has_whole_heads_and_a_name_of_its_own(name: str) -> None:
    shape = named_size(name)
    assert shape.num_heads % shape.num_kv_heads == 0
    assert shape.num_heads * shape.head_dim == shape.hidden or shape.family == "qwen3"
    assert NAMES.count(name) == 1

"""The first config.json files of Falcon and Llama, of classes that transformers never had: read, and made anew."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_twins import theirs
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.verify.gate import verify

_OLD = {"num_attention_heads": "n_head", "num_kv_heads": "n_head_kv", "num_hidden_layers": "n_layer"}
# Those that Falcon's first files had, beside the renamed ones.
_KEPT = ("hidden_size", "layer_norm_epsilon", "vocab_size", "bos_token_id", "eos_token_id")


def as_first_published(path: Path, kind: str) -> None:
    """config.json in the form of Falcon's remote code."""
    config = json.loads((path / "config.json").read_text())
    renamed = {_OLD[key]: config[key] for key in _OLD if kind == "RefinedWeb" or key != "num_kv_heads"}
    old = {key: config[key] for key in _KEPT} | renamed | ({"multi_query": True} if kind == "RefinedWebModel" else {})
    fixed = {"alibi": False, "bias": False, "parallel_attn": True, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    code = {"auto_map": {"AutoConfig": "configuration_RW.RWConfig"}}
    told = {"model_type": kind, "architectures": ["RWForCausalLM"], "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(old | fixed | code | told))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


@pytest.mark.parametrize(("kind", "name"), [("RefinedWebModel", "falcon 7b"), ("RefinedWeb", "falcon 40b")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_falcons_first_form_becomes_transformers_own(
    tmp_path: Path, kind: str, name: str, dtype: torch.dtype | None
) -> None:
    width = {"hidden_size": 40, "num_attention_heads": 5} if kind == "RefinedWebModel" else {"hidden_size": 32}
    model = theirs(name, ffn_hidden_size=4 * width["hidden_size"], tie_word_embeddings=True, **width)
    model.config.bos_token_id = model.config.eos_token_id = 11
    model.save_pretrained(tmp_path / "first")
    as_first_published(tmp_path / "first", kind)
    convert(tmp_path / "first", tmp_path / "out", Target(dtype=dtype))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("falcon", ["FalconForCausalLM"])
    assert (config["bos_token_id"], config["eos_token_id"], "auto_map" in config) == (11, 11, False)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32).float()
    assert torch.equal(logits(made.eval()), logits(model))
    assert verify(tmp_path / "out", tmp_path / "first", tmp_path / "card.json")["verdict"] == "pass"


def test_llamas_first_form_becomes_transformers_own(tmp_path: Path) -> None:
    model = theirs("llama", num_key_value_heads=4, max_position_embeddings=2048)
    model.save_pretrained(tmp_path / "first")
    path = tmp_path / "first/config.json"
    config = json.loads(path.read_text()) | {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048}
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "max_position_embeddings"}))
    convert(tmp_path / "first", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(made.eval()), logits(model))


def test_code_that_is_not_carried_is_not_named(tmp_path: Path) -> None:
    theirs("falcon 7b").save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "configuration_falcon.X"}}))
    convert(tmp_path / "hf", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())

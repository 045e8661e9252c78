"""Mistral's own files, consolidated.safetensors and params.json: transformers' Mistral, renamed, interleaved here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_files import interleave, meta_name
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from llmpipe.checkpoint.convert import convert
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.checkpoint.hub import HubFile, Repository
from llmpipe.checkpoint.hub_choice import choose
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 101, 32, 48, 2, 4, 2, 12, 9
# mistralai/Mistral-7B-v0.1 and -v0.3's params.json, in these sizes.
V01 = {
    "dim": HIDDEN, "n_layers": LAYERS, "head_dim": HEAD_DIM, "hidden_dim": FFN, "n_heads": HEADS,
    "n_kv_heads": KV_HEADS, "norm_eps": 1e-05, "sliding_window": WINDOW, "vocab_size": VOCAB,
}  # fmt: skip
V03 = {key: value for key, value in V01.items() if key != "sliding_window"} | {"rope_theta": 1000000.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v0.1 and v0.3 in both forms: v0.1-hf, v0.1 ..."""
    root = tmp_path_factory.mktemp("mistral")
    for name, window, theta, params in (("v0.1", WINDOW, 1e4, V01), ("v0.3", None, 1e6, V03)):
        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=32768,
            rms_norm_eps=1e-5, sliding_window=window, rope_parameters={"rope_type": "default", "rope_theta": theta},
            initializer_range=0.2,
        )  # fmt: skip
        MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(root / f"{name}-hf")
        write_own(root / name, load_file(root / f"{name}-hf/model.safetensors"), params)
    return root


def write_own(path: Path, tensors: dict[str, torch.Tensor], params: dict[str, Any]) -> Path:
    path.mkdir()
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    own = {}
    for name, tensor in tensors.items():
        count = next((count for which, count in heads.items() if which in name), None)
        own[meta_name(name)[0]] = interleave(tensor, count) if count else tensor
    save_file(own, path / "consolidated.safetensors")
    (path / "params.json").write_text(json.dumps(params))
    return path


@pytest.mark.parametrize("name", ["v0.1", "v0.3"])
def test_converts_to_what_transformers_made(models: Path, tmp_path: Path, name: str) -> None:
    made = convert(models / name, tmp_path / "out")
    expected, found = (load_file(path / "model.safetensors") for path in (models / f"{name}-hf", tmp_path / "out"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    config, theirs = (MistralConfig.from_pretrained(path) for path in (tmp_path / "out", models / f"{name}-hf"))
    for key in ("head_dim", "sliding_window", "rope_parameters", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(config, key) == getattr(theirs, key), key
    assert set(made.source["files"]) == {"consolidated.safetensors", "params.json"}
    assert verify(tmp_path / "out", models / name, tmp_path / "card.json")["verdict"] == "pass"


def test_v01_came_as_a_pth(models: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    torch.save(load_file(models / "v0.1/consolidated.safetensors"), tmp_path / "own/consolidated.00.pth")
    (tmp_path / "own/params.json").write_text(json.dumps(V01 | {"sliding_window": str(WINDOW)}))
    source = open_source(tmp_path / "own")
    assert source.shape == open_source(models / "v0.1").shape
    q = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(source.read("layers.1.attention.q.weight"), load_file(models / "v0.1-hf/model.safetensors")[q])


@pytest.mark.parametrize(("params", "told"), [
    (V01 | {"hidden_dim": 64}, "params.json says hidden_dim 64, but w1 has 48 rows"),
    (V01 | {"head_dim": 8}, "wrong shape: layers.0.attention.wq.weight is [48, 32], expected [32, 32]"),
    (V01 | {"moe": {"num_experts": 8}}, "the key moe is unknown and would be lost"),
    (V01 | {"vision_encoder": {}}, "the key vision_encoder is unknown"),
    ({key: V03[key] for key in V03 if key != "rope_theta"}, "does not say rope_theta: name the model's shape with"),
])  # fmt: skip
def test_what_does_not_fit_is_said(models: Path, tmp_path: Path, params: dict[str, Any], told: str) -> None:
    own = write_own(tmp_path / "own", load_file(models / "v0.1-hf/model.safetensors"), params)
    with pytest.raises(UserError) as error:
        open_source(own)
    assert told in str(error.value)


def test_a_shape_says_what_params_json_does_not(models: Path, tmp_path: Path) -> None:
    params = {key: V03[key] for key in V03 if key != "rope_theta"}
    own = write_own(tmp_path / "own", load_file(models / "v0.3-hf/model.safetensors"), params)
    shape = open_source(models / "v0.3-hf").shape
    assert open_source(own, Told(shape)).shape == shape


def test_fetched_from_the_hub_where_nothing_else_is() -> None:
    own = ["consolidated.safetensors", "params.json"]
    names = [*own, "consolidated.00.pth", "tekken.json", "README.md"]
    repository = Repository("org/name", "0" * 40, {name: HubFile(1, None, "") for name in names})
    assert set(choose(repository)) == {*own, "tekken.json"}
    both = Repository("org/name", "0" * 40, repository.files | {"model.safetensors": HubFile(1, None, "")})
    assert set(choose(both)) == {"model.safetensors", "tekken.json"}


def test_both_forms_of_the_weights_are_refused(models: Path, tmp_path: Path) -> None:
    own = write_own(tmp_path / "own", load_file(models / "v0.1-hf/model.safetensors"), V01)
    torch.save({}, own / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"twice, as consolidated\.00\.pth and as consolidated\.safetensors: take one"):
        open_source(own)

"""The plain EasyLM forward against transformers on the same weights, and against EasyLM's own forward."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from twins import FFN, HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB, make_hf

from easylm_files import easylm_tensors, write_nested, write_stream
from llmpipe.errors import UserError
from llmpipe.verify.compare import probe, run
from llmpipe.verify.easylm import EasyLMModel
from llmpipe.verify.hf import HfModel
from llmpipe.verify.inventory import hyper_parameter_checks, inventory_checks

CONFIG = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
SAID = {"query heads": HEADS, "KV heads": KV_HEADS, "norm eps": 1e-5, "rope theta": 1e4}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face directory, and a trainer's directory of EasyLM's."""
    folder = tmp_path_factory.mktemp("forward")
    hf, easylm = make_hf(folder / "hf"), folder / "easylm"
    easylm.mkdir()
    write_stream(easylm / "streaming_params", tensors_of(hf))
    (easylm / "metadata.pkl").write_bytes(pickle.dumps({"step": 1, "llama_config": CONFIG}))
    return hf, easylm


def tensors_of(hf: Path) -> dict[str, torch.Tensor]:
    return easylm_tensors(load_file(hf / "model.safetensors"), HEAD_SIZE)


@torch.inference_mode()
def error(model: EasyLMModel, hf: Path) -> float:
    """The largest logit difference to transformers' logits, relative to the largest logit."""
    tokens, positions = probe(VOCAB, 512)
    expected = LlamaForCausalLM.from_pretrained(hf).eval()(tokens, position_ids=positions).logits
    return float((run(model, tokens, positions) - expected).abs().max() / expected.abs().max())


def test_it_gives_transformers_logits(twins: tuple[Path, Path]) -> None:
    assert error(EasyLMModel(twins[1]), twins[0]) <= 1e-5


@pytest.mark.parametrize("below", ["params/params/", ""])
def test_any_kind_of_file_gives_the_same(twins: tuple[Path, Path], tmp_path: Path, below: str) -> None:
    tensors, tokens = tensors_of(twins[0]), torch.arange(9)[None]
    files = write_stream(tmp_path / "x", tensors, below, chunk=777), write_nested(tmp_path / "y", tensors, chunk=500)
    expected = run(EasyLMModel(twins[1]), tokens, tokens)
    for file in files:
        assert torch.equal(run(EasyLMModel(file, said=SAID), tokens, tokens), expected)


@pytest.mark.parametrize("fault", ["permute left out", "q and k swapped", "gate and up swapped", "norms swapped"])
def test_wrong_tensors_differ(twins: tuple[Path, Path], tmp_path: Path, fault: str, monkeypatch) -> None:
    if fault == "permute left out":
        monkeypatch.setattr("easylm_files.interleaved", lambda tensor, _: tensor)
    tensors = tensors_of(twins[0])
    first, second = {
        "q and k swapped": ("h/0/attention/wk", "h/1/attention/wk"),
        "gate and up swapped": ("h/1/feed_forward/w1", "h/1/feed_forward/w3"),
        "norms swapped": ("h/2/attention_norm", "h/2/ffn_norm"),
    }.get(fault, ("ln_f", "ln_f"))
    first, second = f"transformer/{first}/kernel", f"transformer/{second}/kernel"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    assert error(EasyLMModel(write_stream(tmp_path / "x", tensors), said=SAID), twins[0]) > 1e-3


@pytest.mark.parametrize("setting", [{"rope theta": 5e5}, {"norm eps": 1e-3}, {"query heads": 4, "KV heads": 1}])
def test_wrong_settings_differ(twins: tuple[Path, Path], setting: dict[str, float]) -> None:
    assert error(EasyLMModel(twins[1], said=setting), twins[0]) > 1e-4


def test_every_tensor_and_setting_has_its_partner(twins: tuple[Path, Path]) -> None:
    source, checkpoint = EasyLMModel(twins[1]), HfModel(twins[0])
    for checks, first in (inventory_checks(source, checkpoint), hyper_parameter_checks(source, checkpoint)):
        assert first is None and all(check.verdict == "pass" for check in checks)
    assert source.hyper_parameters()["rope theta"] == 1e4 and source.hyper_parameters()["longest sequence"] == 512


def test_what_the_files_do_not_say_is_assumed_and_not_said_again(twins: tuple[Path, Path], tmp_path: Path) -> None:
    file = write_stream(tmp_path / "x", tensors_of(twins[0]))
    with pytest.raises(UserError, match=r"does not say the query heads, KV heads, norm eps, rope theta, and no"):
        EasyLMModel(file)
    model = EasyLMModel(file, assumed=HfModel(twins[0]).hyper_parameters())
    assert error(model, twins[0]) <= 1e-5
    said = {"layers", "hidden size", "MLP rows", "vocabulary", "tied embedding", "rope scaling", "window"}
    assert model.hyper_parameters().keys() == said


def test_huggingfaces_config_beside_the_file_is_heard(twins: tuple[Path, Path], tmp_path: Path) -> None:
    write_nested(tmp_path / "flax_model.msgpack", tensors_of(twins[0]))
    (tmp_path / "config.json").write_bytes((twins[0] / "config.json").read_bytes())
    assert error(EasyLMModel(tmp_path), twins[0]) <= 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the rotary embedding is scaled, which EasyLM does not have"):
        EasyLMModel(tmp_path)


def test_a_head_is_tied_only_if_it_is_the_embedding(twins: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = tensors_of(twins[0])
    asked = SAID | {"tied embedding": 1}
    assert EasyLMModel(write_stream(tmp_path / "x", tensors), assumed=asked).hyper_parameters()["tied embedding"] == 0
    tensors["lm_head/kernel"] = tensors["transformer/wte/embedding"].T.contiguous()
    model = EasyLMModel(write_stream(tmp_path / "x", tensors), assumed=asked)
    assert model.tied and "lm_head/kernel" not in model.names()


def test_weights_are_rounded_as_the_other_sides(twins: tuple[Path, Path], tmp_path: Path) -> None:
    tokens = torch.arange(9)[None]
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(twins[0]).items()}
    stored = EasyLMModel(write_stream(tmp_path / "x", rounded), said=SAID)
    assert torch.equal(run(EasyLMModel(twins[1], torch.bfloat16), tokens, tokens), run(stored, tokens, tokens))


def test_a_file_that_lacks_a_tensor_or_has_a_foreign_one_is_refused(twins: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = tensors_of(twins[0])
    foreign = tensors | {"transformer/h/0/attention/bias": torch.ones(3)}
    model = EasyLMModel(write_stream(tmp_path / "x", foreign), said=SAID)
    with pytest.raises(UserError, match="attention/bias is no tensor of EasyLM's Llama"):
        [model.read(name) for name in model.names()]
    del tensors["transformer/ln_f/kernel"]
    model = EasyLMModel(write_stream(tmp_path / "x", tensors), said=SAID)
    with pytest.raises(UserError, match="lacks transformer/ln_f/kernel"):
        model.head(torch.ones(1, 1, HIDDEN))
    layers = {name: tensor for name, tensor in tensors.items() if "h/1/" not in name}
    with pytest.raises(UserError, match=r"has the layers \[0, 2, 3\], expected all from 0 on"):
        EasyLMModel(write_stream(tmp_path / "x", layers), said=SAID)

"""Hugging Face's config.json beside other formats' weights: it says what these leave open, and may not contradict."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.cli.convert import command
from llmpipe.errors import UserError
from llmpipe.families import from_hf_config, named_size
from llmpipe.verify.gate import verify


@pytest.fixture
def config(hf: Path) -> dict[str, Any]:
    return json.loads((hf / "config.json").read_text())


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


def test_it_says_what_metas_files_leave_open(meta: Path, config: dict[str, Any], tmp_path: Path) -> None:
    write_config(meta, config | {"max_position_embeddings": 777, "bos_token_id": 5})
    convert(meta, tmp_path / "out")
    made = json.loads((tmp_path / "out/config.json").read_text())
    assert (made["max_position_embeddings"], made["bos_token_id"]) == (777, 5)
    assert open_source(tmp_path / "out").shape == open_source(meta).shape


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 4, "head_dim": 8}, "num_heads is 8, expected 4"),
    ({"num_key_value_heads": 4}, "num_kv_heads is 2, expected 4"),
    ({"num_hidden_layers": 5}, "num_layers is 4, expected 5"),
    ({"vocab_size": 512}, "vocab is 509, expected 512"),
    ({"rms_norm_eps": 1e-6}, "norm_eps is 1e-05, expected 1e-06"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 500000.0, expected 10000.0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, "rope_scaling is None, expected"),
]


@pytest.mark.parametrize(("change", "told"), CONTRADICTIONS, ids=[told for _, told in CONTRADICTIONS])
@pytest.mark.parametrize("kind", ["meta", "megatron", "easylm"])
def test_contradictions_are_refused(
    meta: Path, config: dict[str, Any], tmp_path: Path, kind: str, change: dict[str, Any], told: str
) -> None:
    source = meta
    if kind != "meta":
        convert(meta, tmp_path / kind, Target("megatron" if kind == "megatron" else "easylm"))
        source = tmp_path / kind
    written = write_config(source, config | change)
    for dry in ("--dry-run", "--no-hash"):
        result = CliRunner().invoke(command, [str(source), "--output", str(tmp_path / "out"), dry])
        assert isinstance(result.exception, UserError) and told in str(result.exception)
        assert str(written) in str(result.exception)
    assert not (tmp_path / "out").exists()
    written.unlink()
    assert open_source(source).shape.num_layers == 4


LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 48}


@pytest.mark.parametrize(
    "change",
    [{}, {"rope_parameters": LINEAR}, {"rope_parameters": LLAMA31}, MISTRAL],
    ids=["theta", "linear scaling", "llama3 scaling", "window"],
)
def test_it_says_what_megatrons_loader_loses(
    meta: Path, config: dict[str, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    """Its args have theta 10000, no scaling and no window, whatever the model has; verify takes the same word on it."""
    convert(meta, tmp_path / "megatron", Target("megatron"))
    file = next((tmp_path / "megatron").rglob("model_optim_rng.pt"))
    saved = torch.load(file, weights_only=False)
    saved["args"].rotary_base = 10000
    del saved["args"].window_size
    torch.save(saved, file)
    (tmp_path / "megatron/manifest.json").unlink()
    write_config(tmp_path / "megatron", config | change)
    convert(tmp_path / "megatron", tmp_path / "out")
    assert open_source(tmp_path / "out").shape == from_hf_config(config | change)
    assert verify(tmp_path / "out", tmp_path / "megatron", tmp_path / "card.json")["verdict"] == "pass"


def test_one_that_cannot_be_read_is_named(meta: Path, config: dict[str, Any]) -> None:
    path = write_config(meta, config | {"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UserError, match=re.escape(f"{path}: architecture 'MambaForCausalLM'")):
        open_source(meta)


def test_a_shape_that_is_told_has_to_agree(meta: Path, config: dict[str, Any], hf: Path) -> None:
    path = write_config(meta, config)
    with pytest.raises(UserError, match=re.escape(f"{path} is not of the shape that was asked for: num_layers is 4")):
        open_source(meta, Told(named_size("llama2_7b")))
    shutil.copy(path, hf)
    assert open_source(meta, Told(open_source(hf).shape)).shape == open_source(hf).shape

"""Hugging Face directories: transformers writes and reads them beside us."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint.containers import safetensors_file
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.hf import HfSource
from llmpipe.errors import UserError
from llmpipe.families import from_hf_config, named_size, to_hf_config

Tensors = dict[str, torch.Tensor]


def rewrite(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def logits(directory: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def test_reads_whole_tensors_and_slices_into_fresh_memory(hf: Path, hf_tensors: Tensors) -> None:
    source = HfSource(hf)
    assert source.shape.rope_theta == 5e5
    assert len(source.keys()) == len(hf_tensors)
    q = hf_tensors["model.layers.3.self_attn.q_proj.weight"]
    assert torch.equal(source.read("layers.3.attention.q.weight"), q)
    part = source.read("layers.3.attention.q.weight", (slice(3, 9), slice(2, 4)))
    assert torch.equal(part, q[3:9, 2:4])
    assert part.is_contiguous()
    for fresh in (part, source.read("layers.3.attention.q.weight")):
        fresh.fill_(7)  # nothing but the caller's own memory changes
    assert torch.equal(source.read("layers.3.attention.q.weight"), q)


def test_valid_directory_is_copied_byte_for_byte(hf: Path, tmp_path: Path) -> None:
    made = convert(hf, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert (tmp_path / "out/generation_config.json").read_bytes() == (hf / "generation_config.json").read_bytes()
    assert torch.equal(logits(tmp_path / "out"), logits(hf))
    assert set(made.source["files"]) == {"config.json", "model.safetensors"}


def test_sharded_directory_is_copied_with_its_index(hf: Path, hf_tensors: Tensors, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(hf).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    convert(tmp_path / "parts", tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(hf))
    source = HfSource(tmp_path / "out")
    assert torch.equal(source.read("norm.weight"), hf_tensors["model.norm.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_is_torchs_own(hf: Path, hf_tensors: Tensors, tmp_path: Path, dtype: torch.dtype) -> None:
    convert(hf, tmp_path / "out", Target(dtype=dtype))
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == hf_tensors.keys()
    for name, tensor in hf_tensors.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor.to(dtype))
    config = LlamaConfig.from_pretrained(tmp_path / "out")
    assert config.dtype == dtype
    assert config.rope_parameters["rope_theta"] == 5e5


def test_config_of_transformers_is_carried_and_ours_is_read_by_transformers(hf: Path) -> None:
    shape = from_hf_config(json.loads((hf / "config.json").read_text()))
    theirs = LlamaConfig.from_pretrained(hf)
    assert (shape.num_kv_heads, shape.head_dim, shape.norm_eps, shape.max_positions) == (2, 4, 1e-5, 4096)
    (hf / "config.json").write_text(json.dumps(to_hf_config(shape, "float32", 1, 2)))
    ours = LlamaConfig.from_pretrained(hf)
    assert ours.to_diff_dict() == theirs.to_diff_dict()


def test_older_config_says_rope_theta_at_its_top(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    assert from_hf_config(config | {"rope_theta": 12345.0, "rope_scaling": None}).rope_theta == 12345.0
    scaled = from_hf_config(config | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(UserError, match="rope scaling 'longrope'"):
        from_hf_config(config | {"rope_scaling": {"type": "longrope", "factor": 2.0}})


def test_published_llama2_config_is_the_named_size() -> None:
    config = {  # as in meta-llama/Llama-2-70b-hf
        "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.32.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert from_hf_config(config) == named_size("llama2_70b")


def test_missing_and_left_over_tensors_are_listed(hf: Path, hf_tensors: Tensors) -> None:
    changed = dict(hf_tensors)
    changed["model.layers.1.mlp.bias"] = changed.pop("model.layers.1.mlp.up_proj.weight")
    changed["model.norm.weight"] = torch.ones(31)
    rewrite(hf, changed)
    with pytest.raises(UserError) as error:
        HfSource(hf)
    assert str(error.value) == (
        f"{hf}: 3 tensors do not fit the model:\n  missing: model.layers.1.mlp.up_proj.weight\n"
        "  left over: model.layers.1.mlp.bias\n  wrong shape: model.norm.weight is [31], expected [32]"
    )


def test_derived_buffers_are_named_in_the_log(
    hf: Path, hf_tensors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rewrite(hf, hf_tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    convert(hf, tmp_path / "out", Target(dtype=torch.bfloat16))
    assert f"{hf}: ignored, derived from config.json: model.layers.0.self_attn.rotary_emb.inv_freq" in caplog.messages
    assert load_file(tmp_path / "out/model.safetensors").keys() == hf_tensors.keys()


def test_tied_head_is_not_stored_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    rewrite(tmp_path / "hf", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    source = HfSource(tmp_path / "hf")
    assert source.shape.tie_embeddings
    assert "head.weight" not in source.keys()  # noqa: SIM118
    assert f"{tmp_path / 'hf'}: ignored, tied to the embedding: lm_head.weight" in caplog.messages


def test_head_that_a_tied_config_would_lose_is_an_error(tmp_path: Path, hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(
        UserError, match=r"says tie_word_embeddings, but lm_head\.weight is not model\.embed_tokens\.weight"
    ):
        HfSource(hf)


def test_truncated_weights_are_named(hf: Path) -> None:
    path = hf / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(UserError, match=re.escape(f"{path} is truncated: {size // 2} bytes found, {size} expected")):
        HfSource(hf)


def test_files_that_disagree_are_named(hf: Path, hf_tensors: Tensors) -> None:
    shutil.copy(hf / "model.safetensors", hf / "other.safetensors")
    (hf / "model.safetensors").rename(hf / "mine.safetensors")
    message = (
        f"{hf} holds mine.safetensors, other.safetensors and no {safetensors_file.INDEX} that says which of them make"
        " the model"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        HfSource(hf)
    (hf / "other.safetensors").rename(hf / "model.safetensors")
    index = hf / safetensors_file.INDEX
    index.write_text("{}")
    with pytest.raises(UserError, match=re.escape(f"{index} has no weight_map: copy or download it again")):
        HfSource(hf)
    (hf / "model.safetensors").rename(hf / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(hf_tensors, "third.safetensors")}))
    with pytest.raises(
        UserError, match=re.escape(f"{hf / 'third.safetensors'} is missing, but the index of {hf} lists it")
    ):
        HfSource(hf)
    (hf / "other.safetensors").rename(hf / "model.safetensors")
    weight_map = {name: "model.safetensors" for name in hf_tensors if name != "lm_head.weight"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        UserError, match=re.escape(f"model.safetensors and the index of {hf} disagree on lm_head.weight")
    ):
        HfSource(hf)


def test_config_that_cannot_be_read_is_named(hf: Path) -> None:
    (hf / "config.json").write_text("{")
    with pytest.raises(UserError, match=re.escape(f"{hf / 'config.json'} is damaged (Expecting property name")):
        HfSource(hf)
    (hf / "config.json").unlink()
    with pytest.raises(UserError, match=re.escape(f"{hf / 'config.json'} is missing: copy or download it again")):
        HfSource(hf)

"""llmpipe inspect on weights: foreign ones without a manifest, and directories that have one."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from meta_files import VOCAB
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from easylm_files import write_stream
from llmpipe.checkpoint import manifest
from llmpipe.cli import group
from llmpipe.cli.inspect import command
from llmpipe.errors import UserError

NAMES = {"self_attn.q_proj": "attention.q", "mlp.down_proj": "mlp.down", "input_layernorm": "attention_norm"}


def shown(*arguments: object) -> list[str]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def made(*arguments: object) -> None:
    """Another command."""
    CliRunner().invoke(group, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def parameters(hf: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(hf).num_parameters()


def test_foreign_weights(hf: Path, meta: Path, parameters: int) -> None:
    rows = [
        f"  model         llama, {parameters:,} parameters in 39 tensors",
        "  layers        4, 32 wide, MLP 48, 8 heads of 4, 2 KV heads",
        f"  vocabulary    {VOCAB} tokens, separate output head",
        "  positions     4,096, rotary theta 500000",
        "  norm eps      1e-05",
        f"  stored as     float32; {4 * parameters:,} bytes",
    ]
    assert shown(hf) == [f"hf weights {hf}", *rows]
    assert shown(meta) == [f"meta weights {meta}", *rows]


def test_tensors_are_those_that_the_file_holds(hf: Path, meta: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    for path in (hf, meta):
        listed = {line.split()[2]: line.split()[:2] for line in shown(path, "--tensors") if line.startswith("  float")}
        assert len(listed) == len(tensors)
        for name, ours in NAMES.items():
            size = "x".join(map(str, tensors[f"model.layers.2.{name}.weight"].shape))
            assert listed[f"layers.2.{ours}.weight"] == ["float32", size]


def test_types_are_counted(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(mixed, hf / "model.safetensors", {"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in mixed.values())
    [stored] = [line for line in shown(hf) if "stored as" in line]
    assert stored == f"  stored as     bfloat16 (30 tensors), float32 (9 tensors); {size:,} bytes"


def test_what_a_family_has_beside_the_usual_is_said(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (hf / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling, "attention_bias": True}))
    tensors = load_file(hf / "model.safetensors")
    for layer in range(4):
        for name in "qkvo":
            weight = tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = torch.zeros(len(weight))
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    lines = shown(hf)
    assert '  positions     4,096, rotary theta 10000, scaling {"rope_type": "linear", "factor": 2.0}' in lines
    assert "  qkv_bias      True" in lines and "  output_bias   True" in lines
    assert not any("mlp_bias" in line for line in lines)


def test_checkpoints_and_rank_files(meta: Path, tmp_path: Path, parameters: int) -> None:
    made("convert", meta, "--dtype", "bf16", "--output", tmp_path / "checkpoint")
    made("shard", tmp_path / "checkpoint", "--tp", 2, "--pp", 2, "--output", tmp_path / "ranks")
    for name in ("checkpoint", "ranks"):
        lines = shown(tmp_path / name, "--tensors")
        assert f"  model         llama, {parameters:,} parameters in 39 tensors" in lines
        assert f"  stored as     bfloat16; {2 * parameters:,} bytes" in lines
        assert sum(line.startswith("  bfloat16 ") for line in lines) == 39
        files = manifest.read(tmp_path / name).files
        assert all(any(line.endswith(f"  {file}") for line in lines) for file in files)


FORMATS = {
    "meta": ("--to", "meta", "--tp", "2"),
    "easylm": ("--to", "easylm"),
    "mcore": ("--to", "megatron", "--dialect", "mcore", "--tp", "2", "--pp", "2"),
    "legacy": ("--to", "megatron", "--dialect", "legacy", "--tp", "2"),
    "epf": ("--to", "megatron", "--dialect", "epf", "--pp", "2"),
    "ali": ("--to", "megatron", "--dialect", "ali", "--tp", "2"),
    "mfz": ("--to", "megatron", "--dialect", "mfz", "--tp", "2"),
}


def share_nothing(hf: Path) -> None:
    """As many KV heads as query heads, and the usual theta: both Megatron-LLaMAs know no others."""
    config = json.loads((hf / "config.json").read_text())
    usual = {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    (hf / "config.json").write_text(json.dumps(config | usual))
    tensors = load_file(hf / "model.safetensors")
    for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
        tensors[name] = torch.cat([tensors[name] + number for number in range(4)])
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_told_and_its_tensors_are_the_same(name: str, hf: Path, tmp_path: Path) -> None:
    if name in ("ali", "mfz"):
        share_nothing(hf)
    parameters = sum(tensor.numel() for tensor in load_file(hf / "model.safetensors").values())
    made("convert", hf, *FORMATS[name], "--output", tmp_path / name)
    (tmp_path / name / "manifest.json").unlink()  # as the originals leave theirs
    more = ("--vocab", VOCAB) if "megatron" in FORMATS[name] else ()
    lines = shown(tmp_path / name, *more)
    assert lines[0] == f"{FORMATS[name][1]} weights {tmp_path / name}"
    assert f"  model         llama, {parameters:,} parameters in 39 tensors" in lines
    if "megatron" in FORMATS[name]:
        assert lines[1].startswith(f"  dialect       {name}, of ")
    done = CliRunner().invoke(group, ["diff", *map(str, (hf, tmp_path / name, *more)), "--changed", "--weights-only"])
    assert done.exit_code == 0 and "39 tensors compared: 39 bit-equal; the same" in done.stdout, done.stdout


def test_what_is_in_doubt_is_told(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_stream(tmp_path / name, {"transformer/ln_f/kernel": torch.zeros(2)})
    with pytest.raises(UserError, match="holds one, two: name the file that you want"):
        shown(tmp_path)
    (tmp_path / "two").unlink()
    with pytest.raises(UserError, match=r"does not say its model's shape, .*: name it with --shape"):
        shown(tmp_path)


def test_damaged_weights_are_told(hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing: model\.norm\.weight"):
        shown(hf)
    manifest.write(hf, "download", {"path": "hf://org/tiny", "commit": "c0ffee"})  # its files are shown all the same
    lines = shown(hf)
    assert lines[0] == f"download {hf}" and "  source commit c0ffee" in lines
    assert any(line.startswith(f"  model         cannot be read: {hf}: 1 tensor") for line in lines)
    assert any(line.endswith("  model.safetensors") for line in lines)


def test_an_adapter_says_what_it_is_for(tmp_path: Path) -> None:
    """The keys are those of PEFT's adapter_config.json, whose target_modules is a list or a pattern."""
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{q}.lora_A.weight": torch.ones(3, 32), f"{q}.lora_B.weight": torch.ones(32, 3)}
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(9, 32)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "org/base", "revision": "v2"}
    config |= {"target_modules": ["v_proj", "q_proj"], "rank_pattern": {}, "use_rslora": True, "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lines = shown(tmp_path)
    for row in (
        "  base          org/base at v2",
        "  kind          rsLoRA, rank 3, alpha 6",
        "  targets       q_proj, v_proj",
        "  adds to       1 tensors",
        "  replaces      lm_head.weight 9x32",
    ):
        assert row in lines, lines
    assert lines[-1].startswith(f"llmpipe convert BASE --adapter {tmp_path} --output DIR")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ".*proj"}))
    (tmp_path / "tokenizer.model").touch()
    assert {"  targets       .*proj", "  tokenizer     tokenizer.model"} <= set(shown(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(UserError, match="peft_type is 'IA3', expected 'LORA'"):
        shown(tmp_path)

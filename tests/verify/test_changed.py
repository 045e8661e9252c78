"""Checkpoints that convert changed on the way pass against their source, and a wrong change does not."""

import json
from pathlib import Path

import megatron_twins
import pytest
import torch
from merge_faults import EMBED, HEAD, MERGE_FAULTS
from peft_files import make_adapter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TARGETS = ("q_proj", "down_proj")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def adapter(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    path.mkdir()
    parts = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.removesuffix(".weight").endswith(TARGETS):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            parts[f"{module}.lora_A.weight"] = torch.randn(2, tensor.shape[1])
            parts[f"{module}.lora_B.weight"] = torch.randn(tensor.shape[0], 2)
    save_file(parts, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(TARGETS), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_a_merged_adapter_is_compared_with_the_merged_source(source: Path, adapter: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", changes=Changes(adapter=adapter))
    assert verify(tmp_path / "out", source)["verdict"] == "pass"


def resigned(path: Path, tensors: dict[str, torch.Tensor], **config) -> None:
    """Other tensors and settings in a checkpoint of the same origin, as a wrong converter would have written them."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"}
    )
    told = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(told | config))
    made = manifest.read(path).source
    (path / "manifest.json").unlink()
    manifest.write(path, "checkpoint", made)


@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_a_wrong_merge_is_refused(tmp_path: Path, fault: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    kind, wrong = MERGE_FAULTS[fault]
    base = load_file(tmp_path / "source/model.safetensors")
    good = make_adapter(kind, base, tmp_path / "adapter")
    convert(tmp_path / "source", tmp_path / "out", changes=Changes(tmp_path / "adapter"))
    resigned(tmp_path / "out", good)
    assert verify(tmp_path / "out", tmp_path / "source")["verdict"] == "pass"
    resigned(tmp_path / "out", wrong(base, good))
    with pytest.raises(UserError, match=r"differs from .*, first at"):
        verify(tmp_path / "out", tmp_path / "source")


def grown(path: Path, rows: int, how: str) -> None:
    """Grow a checkpoint's vocabulary by hand, as the manifest of convert --add-token says it."""
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        mean = tensors[name].double().mean(0).to(tensors[name].dtype)
        new = (mean if how == "mean" else torch.zeros_like(mean)).expand(rows, -1)
        tensors[name] = torch.cat([tensors[name], new])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + rows}))
    made = manifest.read(path).source | {"added_tokens": ["<a>", "<b>"], "new_rows": how}
    (path / "manifest.json").unlink()
    manifest.write(path, "checkpoint", made)


def words(path: Path, size: int) -> None:
    """A tokenizer.json of so many words."""
    model = WordLevel({"<unk>": 0, **{f"w{number}": number for number in range(1, size)}}, "<unk>")
    Tokenizer(model).save(str(path / "tokenizer.json"))


@pytest.mark.parametrize("more", [{"vocab_size": None}, {"vocab_size": megatron_twins.PADDED}, {}], ids=str)
def test_a_grown_vocabulary_of_a_padded_source(tmp_path: Path, more: dict) -> None:
    """Megatron's args say the true vocabulary, the padded one, or nothing: then the tokenizer beside counts."""
    plain = load_file(megatron_twins.llama(tmp_path / "hf", 2) / "model.safetensors")
    source, out = megatron_twins.write("legacy", plain, tmp_path / "megatron", 2, 1, 2, **more), tmp_path / "out"
    old = more.get("vocab_size") or megatron_twins.VOCAB
    words(source, old)
    convert(source, out, changes=Changes(tokens=("<a>", "<b>")))
    assert len(load_file(out / "model.safetensors")[HEAD]) == old + 2
    card = verify(out, source)
    row = next(check for check in card["checks"] if check["name"] == "rows of added tokens that differ")
    assert card["verdict"] == "pass" and row["value"] == 0
    tensors = load_file(out / "model.safetensors")
    tensors[HEAD][old, 3] += 0.01
    resigned(out, tensors)
    with pytest.raises(UserError, match=r"rows of added tokens that differ 1 \(limit 0\)"):
        verify(out, source)


@pytest.mark.parametrize("how", ["mean", "zeros"])
def test_a_grown_vocabulary_is_compared_without_its_new_rows(source: Path, tmp_path: Path, how: str) -> None:
    out = tmp_path / "out"
    convert(source, out)
    grown(out, 2, how)
    card = verify(out, source)
    row = next(check for check in card["checks"] if check["name"] == "rows of added tokens that differ")
    assert card["verdict"] == "pass" and row["value"] == 0
    tensors = load_file(out / "model.safetensors")
    tensors["lm_head.weight"][-1, 3] += 0.01
    resigned(out, tensors)
    with pytest.raises(UserError, match=r"rows of added tokens that differ 1 \(limit 0\)"):
        verify(out, source)


def test_new_rows_of_a_cast_checkpoint_are_the_mean_of_the_source_s_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    out, old = tmp_path / "out", load_file(tmp_path / "source/model.safetensors")
    convert(tmp_path / "source", out, Target(dtype=torch.bfloat16))
    grown(out, 2, "mean")
    with pytest.raises(UserError, match=r"rows of added tokens that differ 2 \(limit 0\)"):
        verify(out, tmp_path / "source")  # the mean of rows that were rounded before
    tensors = load_file(out / "model.safetensors")
    for name in (EMBED, HEAD):
        tensors[name][61:] = old[name].double().mean(0).bfloat16()
    resigned(out, tensors)
    assert verify(out, tmp_path / "source")["verdict"] == "pass"

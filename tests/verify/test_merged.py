"""The reference with an adapter merged: transformers' logits of the merged weights, from every format."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft_files import KINDS, make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_twins import VOCAB, theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.cli.verify import command
from llmpipe.errors import UserError
from llmpipe.files import sha256
from llmpipe.layout import Stages
from llmpipe.verify.compare import probe, run
from llmpipe.verify.gate import open_reference, verify
from llmpipe.verify.hf import HfModel
from llmpipe.verify.inventory import inventory_checks
from llmpipe.verify.merged import Adapter
from llmpipe.verify.merged_models import MergedHf

LIMIT = 1e-5
ROPE = {"rope_type": "default", "rope_theta": 1e4}
TP2_PP3 = Target("megatron", "mcore", 2, Stages(3))


def made(folder: Path, name: str, kind: str, **changes) -> tuple[Path, torch.Tensor]:
    """A model and an adapter in folder/base and folder/adapter; transformers' logits of the merged model."""
    theirs(name, **changes).save_pretrained(folder / "base")
    merged = make_adapter(kind, load_file(folder / "base/model.safetensors"), folder / "adapter")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            parameter.copy_(merged[name])
        tokens, positions = probe(VOCAB, 48)
        return folder / "base", model(tokens, position_ids=positions).logits


def difference(side, logits: torch.Tensor) -> float:
    """max |Δlogit| / max |logit|."""
    return float((run(side, *probe(VOCAB, 48)) - logits).abs().max() / logits.abs().max())


CASES = [
    *(("llama, biases", kind) for kind in KINDS), *(("falcon 40b", kind) for kind in ("lora", "dora", "patterns")),
    ("falcon 7b", "rslora"), ("qwen2", "lora"), ("qwen3", "dora"), ("mistral", "patterns"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_of_a_merged_model(tmp_path: Path, name: str, kind: str) -> None:
    base, logits = made(tmp_path, name, kind)
    convert(base, tmp_path / "out", changes=Changes(tmp_path / "adapter"))
    source = open_reference(base, made_from=manifest.read(tmp_path / "out").source)
    assert difference(HfModel(base), logits) > 1e-2
    assert difference(source, logits) <= LIMIT
    assert verify(tmp_path / "out", base)["verdict"] == "pass"


@pytest.mark.parametrize(("name", "kind", "target"), [
    ("llama", "dora", Target("meta", tp=2)), ("llama", "embedding", Target("easylm")),
    ("llama", "patterns", Target("megatron", "legacy", 2)), ("llama", "whole", Target("megatron", "epf", 2)),
    ("falcon 40b", "dora", Target("megatron", "epf", 2)), ("qwen3", "lora", TP2_PP3),
])  # fmt: skip
def test_an_adapter_merged_into_a_foreign_format(tmp_path: Path, name: str, kind: str, target: Target) -> None:
    changes = {"llama": {"rope_parameters": ROPE}, "falcon 40b": {"tie_word_embeddings": True}}
    base, logits = made(tmp_path, name, kind, **changes.get(name, {}))
    foreign, out = tmp_path / "foreign", tmp_path / "out"
    convert(base, foreign, target)
    convert(foreign, out, told=Told(open_source(base).shape), changes=Changes(tmp_path / "adapter"))
    settings = HfModel(base).hyper_parameters()
    assert difference(open_reference(foreign, None, settings, manifest.read(out).source), logits) <= LIMIT
    assert verify(out, foreign)["verdict"] == "pass"


def test_an_adapter_merged_on_the_way_to_a_foreign_format(tmp_path: Path) -> None:
    base, _ = made(tmp_path, "llama", "dora")
    convert(base, tmp_path / "out", Target("megatron", "mcore", 2), changes=Changes(tmp_path / "adapter"))
    assert verify(tmp_path / "out", base)["verdict"] == "pass"


@pytest.mark.parametrize("target", [None, Target("meta"), TP2_PP3])
@pytest.mark.parametrize(("own", "tied"), [(("lm_head",), 0), (("model.embed_tokens",), 0), (("both", "resized"), 1)])
def test_tied_tables(tmp_path: Path, target: Target | None, own: tuple[str, ...], tied: int) -> None:
    theirs("llama, tied", rope_parameters=ROPE).save_pretrained(tmp_path / "base")
    source, out, adapter = tmp_path / "base", tmp_path / "out", tmp_path / "adapter"
    make_adapter("lora", load_file(source / "model.safetensors"), adapter)
    rows = torch.randn(VOCAB + 2 * ("resized" in own), 32)
    held = load_file(adapter / "adapter_model.safetensors")
    names = ("lm_head", "model.embed_tokens") if tied else own
    held |= {f"base_model.model.{name}.weight": rows.clone() for name in names}
    save_file(held, adapter / "adapter_model.safetensors")
    told = Told(open_source(source).shape)
    if target:
        convert(source, tmp_path / "foreign", target)
        source = tmp_path / "foreign"
    convert(source, out, told=told, changes=Changes(adapter))
    side = open_reference(source, None, HfModel(out).hyper_parameters(), manifest.read(out).source)
    found = side.hyper_parameters()
    assert (found["vocabulary"], found["tied embedding"]) == (len(rows), tied)
    assert verify(out, source)["verdict"] == "pass"


def test_a_sum_in_doubt_may_be_either_neighbour_and_no_other(tmp_path: Path) -> None:
    """W is 1 and B A is half of what fp32 can tell from it: an exact tie."""
    theirs("llama").save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    q = "model.layers.1.self_attn.q_proj"
    tensors[f"{q}.weight"].fill_(1.0)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    make_adapter("lora", {f"{q}.weight": tensors[f"{q}.weight"]}, tmp_path / "adapter")
    parts = {"lora_A": torch.full((3, 32), 2.0**-24), "lora_B": torch.tensor([[3 / 5, 0, 0]]).expand(32, 3)}
    held = {f"base_model.model.{q}.{name}.weight": part.contiguous() for name, part in parts.items()}
    save_file(held, tmp_path / "adapter/adapter_model.safetensors")
    source = MergedHf(opened(tmp_path / "adapter"), tmp_path / "base")
    for more, wrong in ((0.0, 0), (2.0**-23, 0), (2.0**-22, 2), (-(2.0**-24), 2)):
        changed = tensors[f"{q}.weight"].clone()
        changed[3, 5] += more
        theirs("llama").save_pretrained(tmp_path / "out")
        save_file(tensors | {f"{q}.weight": changed}, tmp_path / "out/model.safetensors", {"format": "pt"})
        checks, _ = inventory_checks(source, HfModel(tmp_path / "out"), source.bounds)
        assert next(check.value for check in checks if check.name == "tensors without a partner") == wrong


def opened(path: Path) -> Adapter:
    return Adapter(path, {file.name: sha256(file) for file in path.iterdir()})


def test_an_adapter_that_is_gone_or_another_is_named(tmp_path: Path) -> None:
    base, _ = made(tmp_path, "llama", "lora")
    convert(base, tmp_path / "out", changes=Changes(tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    with pytest.raises(UserError, match=r"adapter_config.json is not the one that was merged"):
        verify(tmp_path / "out", base)
    file.write_text(file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 5'))
    moved = (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"adapter_config.json, which was merged into the checkpoint, is not there"):
        verify(tmp_path / "out", base)
    told = [str(tmp_path / "out"), "--reference", str(base), "--adapter", str(moved)]
    assert CliRunner().invoke(command, told).exit_code == 0
    convert(base, tmp_path / "plain")
    with pytest.raises(UserError, match=r"plain was made without one: leave it out"):
        verify(tmp_path / "plain", base, adapter=moved)


@pytest.mark.parametrize(("settings", "more", "told"), [
    ({"peft_type": "IA3"}, {}, "does not merge peft_type: IA3"),
    ({"init_lora_weights": "pissa"}, {}, "does not merge init_lora_weights: pissa"),
    ({"layer_replication": [[0, 2]]}, {}, "does not merge layer_replication"),
    ({"use_dora": True}, {}, "use_dora is True, unlike the tensors of"),
    ({}, {"model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(40)}, "cannot merge"),
    ({}, {"model.layers.7.mlp.up_proj.bias": torch.ones(40)}, r"changes model.layers.7.*does not have"),
])  # fmt: skip
def test_what_the_reference_cannot_merge(tmp_path: Path, settings: dict, more: dict, told: str) -> None:
    base, _ = made(tmp_path, "llama", "lora")
    path = tmp_path / "adapter"
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | settings))
    held = load_file(path / "adapter_model.safetensors")
    held |= {f"base_model.model.{name}": tensor for name, tensor in more.items()}
    save_file(held, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=told):
        MergedHf(opened(path), base).read("model.layers.0.mlp.up_proj.weight")

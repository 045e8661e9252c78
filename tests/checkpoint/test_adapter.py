"""LoRA adapters merged: expected values by the papers' formulas in torch.

PEFT 0.21.2 itself (PeftModel.from_pretrained on the base in fp32, merge_and_unload, rounded to bf16) gave the same for
sixteen adapters (each option below, on Llama, Qwen2, Qwen3 and Falcon): to one ulp of bf16, and transformers' logits of
the merged fp32 model are those of PEFT's unmerged one to 2e-6. Where embedding and head are tied PEFT's own merge adds
one's update to the other; its unmerged model does not, and neither do we.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_twins import VOCAB, theirs
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.adapter import AdaptedSource
from llmpipe.checkpoint.changes import Changes
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import open_source
from llmpipe.cli.convert import command
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify
from llmpipe.verify.merged import Adapter as Reference

R, ALPHA = 3, 5
LAYER = "model.layers.1."
Q, DOWN = LAYER + "self_attn.q_proj", LAYER + "mlp.down_proj"


def base(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A model of transformers in folder/base; its tensors."""
    theirs(name, dtype=dtype).save_pretrained(folder / "base")
    return load_file(folder / "base/model.safetensors")


def factors(tensors: dict[str, torch.Tensor], *modules: str, rank: int = R) -> dict[str, torch.Tensor]:
    """lora_A and lora_B for modules, by PEFT's names."""
    generator, found = torch.Generator().manual_seed(1), {}
    for module in modules:
        out, into = tensors[f"{module}.weight"].shape
        found[f"{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        found[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 8
    return found


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """The directory that PEFT's save_pretrained makes."""
    (folder / "adapter").mkdir(exist_ok=True)
    told = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "base_model_name_or_path": "org/base", "revision": None}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(told | {"use_dora": False, "bias": "none"} | config))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter/adapter_model.safetensors")
    return folder / "adapter"


def merged(folder: Path, target: Target = Target()) -> dict[str, torch.Tensor]:  # noqa: B008
    convert(folder / "base", folder / "out", target, changes=Changes(folder / "adapter"))
    return load_file(folder / "out/model.safetensors")


def update(held: dict[str, torch.Tensor], module: str, scaling: float = ALPHA / R) -> torch.Tensor:
    return scaling * (held[f"{module}.lora_B.weight"].double() @ held[f"{module}.lora_A.weight"].double())


def unlike(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in found if name not in before or not torch.equal(found[name], before[name])}


@pytest.mark.parametrize(("name", "modules"), [
    ("llama", (Q, LAYER + "self_attn.k_proj", DOWN)),
    ("falcon 7b", ("transformer.h.1.self_attention.query_key_value", "transformer.h.0.mlp.dense_h_to_4h")),
    ("falcon 40b", ("transformer.h.1.self_attention.query_key_value", "transformer.h.1.self_attention.dense")),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_b_times_a_is_added_and_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, modules: tuple[str, ...], dtype: torch.dtype
) -> None:
    monkeypatch.setattr("llmpipe.checkpoint.adapter.CHUNK_BYTES", 2000)  # a few rows at a time
    tensors = base(tmp_path, name, dtype)
    held = factors(tensors, *modules)
    adapter(tmp_path, held)
    found = merged(tmp_path)
    assert unlike(found, tensors) == {f"{module}.weight" for module in modules}
    for module in modules:
        expected = (tensors[f"{module}.weight"].double() + update(held, module)).to(dtype)
        assert torch.equal(found[f"{module}.weight"], expected) and expected.dtype == dtype


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wider_type_is_what_is_rounded_to(tmp_path: Path, dtype: torch.dtype, to: Literal["hf", "megatron"]) -> None:
    """No bf16 comes between the sum and what is written; what can hold both is fp32, fp16 cannot."""
    tensors = base(tmp_path, dtype=torch.bfloat16)
    held, own = factors(tensors, Q), torch.randn(32) / 3
    adapter(tmp_path, held | {"model.norm.weight": own}, modules_to_save=["norm"])
    convert(tmp_path / "base", tmp_path / "out", Target(to, dtype=dtype), changes=Changes(tmp_path / "adapter"))
    assert verify(tmp_path / "out", tmp_path / "base")["verdict"] == "pass"
    convert(tmp_path / "out", tmp_path / "back")
    found, expected = load_file(tmp_path / "back/model.safetensors"), tensors[f"{Q}.weight"].double() + update(held, Q)
    assert torch.equal(found[f"{Q}.weight"], expected.float().to(dtype))
    assert torch.equal(found["model.norm.weight"], own.to(dtype))
    assert not torch.equal(found[f"{Q}.weight"], expected.bfloat16().to(dtype))
    assert torch.equal(found[f"{DOWN}.weight"], tensors[f"{DOWN}.weight"].to(dtype))


@pytest.mark.parametrize(("config", "scaling"), [
    ({"use_rslora": True}, ALPHA / R**0.5),
    ({"alpha_pattern": {"k_proj": 1, "q_proj": 7}}, 7 / R),
    ({"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 2}}, 2 / R),
    ({"r": 8, "rank_pattern": {"layers.1.self_attn.q_proj": R}}, ALPHA / R),
    ({"fan_in_fan_out": True, "lora_dropout": 0.1, "target_modules": ["q_proj"]}, ALPHA / R),
])  # fmt: skip
def test_scaling(tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    tensors = base(tmp_path)
    held = factors(tensors, Q)
    adapter(tmp_path, held, **config)
    expected = tensors[f"{Q}.weight"].double() + update(held, Q, scaling)
    assert torch.equal(merged(tmp_path)[f"{Q}.weight"], expected.float())


def test_dora_brings_rows_to_its_magnitudes(tmp_path: Path) -> None:
    tensors = base(tmp_path)
    held = factors(tensors, Q, DOWN)
    magnitudes = {module: torch.rand(len(tensors[f"{module}.weight"])) for module in (Q, DOWN)}
    adapter(tmp_path, held | {f"{m}.lora_magnitude_vector": row for m, row in magnitudes.items()}, use_dora=True)
    source = AdaptedSource(open_source(tmp_path / "base"), tmp_path / "adapter")
    for module, key in ((Q, "layers.1.attention.q.weight"), (DOWN, "layers.1.mlp.down.weight")):
        direction = tensors[f"{module}.weight"].double() + update(held, module)
        expected = magnitudes[module].double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
        assert torch.allclose(source.read(key), expected.float(), rtol=1e-6)
        assert torch.equal(source.read(key, (slice(2, 9), slice(4, 8))), source.read(key)[2:9, 4:8])


def test_tensors_of_the_adapters_own_replace_the_models(tmp_path: Path) -> None:
    tensors = base(tmp_path, "llama, biases")
    own = {"lm_head.weight": torch.randn(VOCAB, 32), "model.norm.weight": torch.randn(32)}
    biases = {f"{Q}.base_layer.bias": torch.randn(32), f"{DOWN}.bias": torch.randn(32)}
    adapter(tmp_path, own | biases, bias="all", modules_to_save=["lm_head", "norm"])
    found = merged(tmp_path)
    assert unlike(found, tensors) == {*own, f"{Q}.bias", f"{DOWN}.bias"}
    for name, tensor in (own | biases).items():
        assert torch.equal(found[name.replace(".base_layer", "")], tensor)


@pytest.mark.parametrize("wrapped", ["modules_to_save", "modules_to_save.default"])
def test_what_peft_writes_besides_the_trained_tensor_is_the_bases(tmp_path: Path, wrapped: str) -> None:
    """The keys of PEFT 0.21.2's save_pretrained(save_embedding_layers=True) with modules_to_save: [lm_head]."""
    tensors = base(tmp_path)
    own, embedding = torch.randn(VOCAB, 32), tensors["model.embed_tokens.weight"]
    held = {f"lm_head.{wrapped}.weight": own, "lm_head.original_module.weight": tensors["lm_head.weight"]}
    held |= {"lm_head.weight": own.clone(), "model.embed_tokens.weight": embedding} | factors(tensors, Q)
    adapter(tmp_path, held, modules_to_save=["lm_head"])
    found = merged(tmp_path)
    assert unlike(found, tensors) == {"lm_head.weight", f"{Q}.weight"}
    assert torch.equal(found["lm_head.weight"], own)
    assert verify(tmp_path / "out", tmp_path / "base")["verdict"] == "pass"


def test_an_embedding_has_its_factors_transposed(tmp_path: Path) -> None:
    tensors = base(tmp_path)
    a, b = torch.randn(R, VOCAB), torch.randn(32, R)
    adapter(tmp_path, {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b})
    found = merged(tmp_path)
    expected = tensors["model.embed_tokens.weight"].double() + ALPHA / R * (b.double() @ a.double()).T
    assert torch.equal(found["model.embed_tokens.weight"], expected.float())


@pytest.mark.parametrize("place", ["lm_head", "model.embed_tokens"])
def test_a_tied_embedding_and_head_come_apart(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors = base(tmp_path, "llama, tied")
    own = torch.randn(VOCAB, 32)
    adapter(tmp_path, {f"{place}.weight": own}, modules_to_save=[place.rpartition(".")[2]])
    found = merged(tmp_path)
    other = "model.embed_tokens" if place == "lm_head" else "lm_head"
    assert torch.equal(found[f"{place}.weight"], own)
    assert torch.equal(found[f"{other}.weight"], tensors["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings and torch.equal(model.lm_head.weight, found["lm_head.weight"])
    assert any("embedding and head were tied" in message for message in caplog.messages)


def test_a_resized_embedding_saved_twice_stays_tied_and_grows(tmp_path: Path) -> None:
    base(tmp_path, "llama, tied")
    own = torch.randn(VOCAB + 2, 32)
    adapter(tmp_path, {"model.embed_tokens.weight": own, "lm_head.weight": own.clone()})
    assert torch.equal(merged(tmp_path)["model.embed_tokens.weight"], own)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (VOCAB + 2, True)


def test_a_resized_embedding_alone_is_the_heads_unless_it_was_trained_apart(tmp_path: Path) -> None:
    """PEFT 0.21.2, save_pretrained(save_embedding_layers=False) of modules_to_save: [embed_tokens] on a resized model.

    Its head stays the base's, whose new rows transformers drew; outside of modules_to_save head and embedding are one.
    """
    base(tmp_path, "llama, tied")
    own = torch.randn(VOCAB + 2, 32)
    adapter(tmp_path, {"model.embed_tokens.weight": own}, modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight was resized and trained apart from the head"):
        merged(tmp_path)
    with pytest.raises(UserError, match="was resized apart from the head"):
        Reference(tmp_path / "adapter", {}).keeps_tied("model.embed_tokens.weight", VOCAB)
    adapter(tmp_path, {"model.embed_tokens.weight": own}, modules_to_save=None)
    assert torch.equal(merged(tmp_path)["model.embed_tokens.weight"], own)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert Reference(tmp_path / "adapter", {}).keeps_tied("model.embed_tokens.weight", VOCAB)


def test_weight_tying_that_peft_ensured(tmp_path: Path) -> None:
    """PEFT 0.21.2 writes the head's tensors beside the embedding's, LoRA factors the other way round."""
    tensors = base(tmp_path, "llama, tied")
    embedding, (a, b) = tensors["model.embed_tokens.weight"], (torch.randn(R, VOCAB), torch.randn(32, R))
    own = torch.randn(VOCAB, 32)
    whole = {"model.embed_tokens.weight": own, "lm_head.weight": own.clone()}
    adapter(tmp_path, whole, ensure_weight_tying=True, modules_to_save=["embed_tokens", "model.embed_tokens"])
    assert torch.equal(merged(tmp_path)["model.embed_tokens.weight"], own)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    held = {"model.embed_tokens.lora_embedding_A": a, "model.embed_tokens.lora_embedding_B": b}
    held |= {"lm_head.lora_A.weight": b.T, "lm_head.lora_B.weight": a.T}
    held |= {f"{name}.base_layer.weight": embedding.clone() for name in ("model.embed_tokens", "lm_head")}
    adapter(tmp_path, held, ensure_weight_tying=True, target_modules=["embed_tokens", "model.embed_tokens"])
    found, expected = merged(tmp_path), embedding.double() + ALPHA / R * (a.double().T @ b.double().T)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], expected.float())


def test_the_manifest_finds_the_adapter_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path, factors(base(tmp_path), Q))
    monkeypatch.chdir(tmp_path)
    convert(Path("base"), Path("out"), changes=Changes(Path("adapter")))
    told = manifest.check(tmp_path / "out").source["adapter"]
    assert told["path"] == str(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert told["files"][name] == hashlib.sha256((tmp_path / "adapter" / name).read_bytes()).hexdigest()


def test_bin_casts_other_formats_and_the_manifest(tmp_path: Path) -> None:
    tensors = base(tmp_path)
    held = factors(tensors, Q)
    path = adapter(tmp_path, held)
    (path / "adapter_model.safetensors").unlink()
    torch.save({f"base_model.model.{name}": tensor for name, tensor in held.items()}, path / "adapter_model.bin")
    found = merged(tmp_path, Target(dtype=torch.bfloat16))
    whole = (tensors[f"{Q}.weight"].double() + update(held, Q)).float()
    assert torch.equal(found[f"{Q}.weight"], whole.bfloat16())
    told = manifest.check(tmp_path / "out").source["adapter"]
    assert told["base_model_name_or_path"] == "org/base" and len(told["files"]["adapter_model.bin"]) == 64
    convert(tmp_path / "base", tmp_path / "mega", Target("megatron", tp=2), changes=Changes(path))
    convert(tmp_path / "mega", tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")[f"{Q}.weight"], whole)


REFUSED = [
    ({"peft_type": "IA3"}, {}, "peft_type is 'IA3', expected 'LORA'"),
    ({"init_lora_weights": "pissa"}, {}, "init_lora_weights is 'pissa', which also changed the weights"),
    ({"layer_replication": [[0, 2]]}, {}, "llmpipe does not merge layer_replication: [[0, 2]]"),
    ({"trainable_token_indices": [3, 5]}, {}, "llmpipe does not merge trainable_token_indices: [3, 5]: merge it with"),
    ({}, {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}, "1 tensors belong to nothing"),
    ({"r": 0}, {}, "r is 0, expected a number above 0"),
    ({"rank_pattern": ["q_proj"]}, {}, "rank_pattern is ['q_proj'], no table of patterns"),
    ({"alpha_pattern": {"(": 2}}, {}, "alpha_pattern is {'(': 2}, no table of patterns"),
    ({"alpha_pattern": {"q_proj": "4"}}, {}, "alpha_pattern['q_proj'] is '4', expected a number above 0"),
    ({"lora_alpha": float("inf")}, {}, "lora_alpha is inf, expected a number above 0"),
    ({}, {"model.embed_tokens.weight": torch.tensor(1.0)}, "model.embed_tokens.weight is [], no matrix"),
    ({}, {"model.norm.weight": torch.ones(32).int()}, "model.norm.weight is torch.int32, expected floating-point"),
    ({"r": 4}, {}, f"{Q} has factors of [32, 3] and [3, 32], but adapter_config.json says rank 4"),
    ({"use_dora": True}, {}, f"says use_dora, but {Q} has no magnitudes"),
    ({}, {f"{Q}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector does not fit"),
    ({}, {f"{DOWN}.lora_A.weight": torch.ones(R, 40)}, f"{DOWN} has lora_A, expected lora_A and lora_B"),
    ({}, {f"{Q}.lora_B.bias": torch.ones(32)}, f"belong to nothing that llmpipe merges: base_model.model.{Q}"),
    ({}, {f"{Q}.weight": torch.ones(32, 32), f"{Q}.base_layer.weight": torch.ones(32, 32)}, "1 tensors belong to"),
    ({}, {"norm.modules_to_save.weight": torch.ones(32), "norm.weight": torch.zeros(32)}, "1 tensors belong to"),
    ({}, {"norm.original_module.weight": torch.ones(32)}, "norm.original_module.weight is [32], the model's has none"),
    ({}, {"model.norm.weight": torch.ones(31)}, "model.norm.weight is [31], the model's [32]"),
    ({}, {f"{Q}.bias": torch.ones(32)}, f"{Q}.bias is [32], the model's has none: name the weights it was"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "more", "told"), REFUSED, ids=[told[:30] for _, _, told in REFUSED])
def test_what_cannot_be_merged_is_said(tmp_path: Path, config: dict, more: dict, told: str) -> None:
    adapter(tmp_path, factors(base(tmp_path), Q) | more, **config)
    with pytest.raises(UserError, match=re.escape(told)):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_an_adapter_is_named(tmp_path: Path) -> None:
    base(tmp_path)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        merged(tmp_path)
    path = adapter(tmp_path, {"model.norm.weight": torch.ones(32)})
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="holds none of adapter_model"):
        merged(tmp_path)


def test_from_the_command_line(tmp_path: Path) -> None:
    path = adapter(tmp_path, factors(base(tmp_path), Q))
    told = ["--output", str(tmp_path / "out"), "--adapter", str(path)]
    done = CliRunner().invoke(command, [str(tmp_path / "base"), *told, "--dry-run"])
    assert done.exit_code == 0 and done.output.count("computed: ") == 1, done.output
    assert "computed: layers.1.attention.q.weight" in done.output

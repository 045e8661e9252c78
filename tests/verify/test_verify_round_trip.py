"""The way back from a checkpoint of transformers to twins of it in every format, laid out by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import megatron_twins
import pytest
import torch
import twins
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from easylm_files import easylm_tensors, write_stream
from llmpipe.checkpoint.convert import Target, convert
from llmpipe.layout import Stages
from llmpipe.verify.easylm import EasyLMModel
from llmpipe.verify.gate import verify
from llmpipe.verify.hf import HfModel
from llmpipe.verify.megatron import MegatronModel
from llmpipe.verify.meta import MetaModel
from llmpipe.verify.round_trip import round_trip_checks

FORKS = [
    ("epf fresh", 1, 1, 2), ("epf", 2, 2, 2), ("legacy", 4, 1, 8), ("mcore", 2, 1, 2), ("te", 2, 4, 2),
    ("ali", 2, 2, 8), ("mfz", 4, 2, 8), ("dist", 1, 1, 2),
]  # fmt: skip
ASSUMED = {"query heads": megatron_twins.HEADS, "norm eps": megatron_twins.EPS, "rope theta": 1e4}


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time."""
    monkeypatch.setattr("llmpipe.checkpoint.mover._WINDOW_BYTES", 2000)
    monkeypatch.setattr("llmpipe.checkpoint.mover._TRANSPOSED_BYTES", 2000)


def differing(subject: Path, source, made_from: dict | None = None) -> tuple[float | None, str]:
    """How many tensors do not come back, and the row's words."""
    (check,), first = round_trip_checks(subject, source, made_from or {})
    assert (first is None) == (check.verdict == "pass")
    return check.value, check.detail


def megatron(path: Path, **more) -> MegatronModel:
    return MegatronModel(path, assumed=ASSUMED | {"vocabulary": megatron_twins.VOCAB}, **more)


def cast(hf: Path, path: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).to(dtype).save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("fork", "tp", "pp", "kv_heads"), FORKS)
def test_back_to_each_fork_of_megatron(tmp_path: Path, fork: str, tp: int, pp: int, kv_heads: int) -> None:
    hf = megatron_twins.llama(tmp_path / "hf", kv_heads)
    state = load_file(hf / "model.safetensors")
    if fork == "dist":
        path = megatron_twins.write_torch_dist(state, tmp_path / "there", kv_heads)
    else:
        path = megatron_twins.write(fork, state, tmp_path / "there", tp, pp, kv_heads)
    count = tp * (6 * megatron_twins.LAYERS + 3)
    told = f"{count} tensors as Megatron's files hold them are the source's, bit for bit as stored"
    assert differing(hf, megatron(path)) == (0, told)
    assert differing(cast(hf, tmp_path / "bf16", torch.bfloat16), megatron(path))[0] == 0


@pytest.mark.parametrize(("kv_heads", "tp", "pp"), [(1, 1, 2), (2, 2, 2)])
def test_back_to_falcon_and_its_copy_of_the_embedding(tmp_path: Path, kv_heads: int, tp: int, pp: int) -> None:
    hf = megatron_twins.falcon(tmp_path / "hf", kv_heads)
    state = load_file(hf / "model.safetensors")
    source = megatron(megatron_twins.write_falcon(state, tmp_path / "there", tp, pp, kv_heads))
    assert differing(hf, source)[0] == 0
    state["transformer.word_embeddings.weight"][7, 3] += 1
    save_file(state, hf / "model.safetensors", {"format": "pt"})
    assert differing(hf, source)[0] == 2  # the first stage's and the last's


def test_norms_less_one_and_the_old_permutation(tmp_path: Path) -> None:
    hf = megatron_twins.llama(tmp_path / "hf", 2)
    state = load_file(hf / "model.safetensors")
    path = megatron_twins.write("te", state, tmp_path / "less", 2, 1, 2, less_one=True, apply_layernorm_1p=True)
    assert differing(hf, megatron(path))[0] == 0
    plain = megatron_twins.write("te", state, tmp_path / "plain", 2, 1, 2, apply_layernorm_1p=True)
    assert differing(hf, megatron(plain))[0] == 2 * (2 * megatron_twins.LAYERS + 1)
    old = megatron_twins.write("epf", state | swapped_orders(state), tmp_path / "old", 2, 1, 2)
    assert differing(hf, megatron(old, old_permutation=True))[0] == 0
    assert differing(hf, megatron(old))[0] == 2 * megatron_twins.LAYERS


def swapped_orders(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q and k such that the twin's interleaving leaves them half after half."""
    names = [name for name in state if "q_proj" in name or "k_proj" in name]
    return {name: halves(state[name]) for name in names}


def halves(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unflatten(0, (-1, twins.HEAD_SIZE // 2, 2)).transpose(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize("shards", [1, 2])
def test_back_to_meta_and_easylm(tmp_path: Path, shards: int) -> None:
    hf = twins.make_hf(tmp_path / "hf")
    meta = MetaModel(twins.make_meta(hf, tmp_path / "meta", shards))
    tensors = easylm_tensors(load_file(hf / "model.safetensors"), twins.HEAD_SIZE)
    file = write_stream(tmp_path / "easylm", tensors, chunk=777)
    easylm = EasyLMModel(file, assumed=HfModel(hf).hyper_parameters())
    for source, count in ((meta, shards * (9 * twins.LAYERS + 3)), (easylm, 9 * twins.LAYERS + 3)):
        found = differing(hf, source)
        assert found[0] == 0 and found[1].startswith(f"{count} tensors as {source.kind}'s files")
    assert differing(cast(hf, tmp_path / "fp16", torch.float16), meta)[0] == 0


def test_back_to_bin_files_and_a_head_that_is_stored_though_tied(tmp_path: Path) -> None:
    hf = twins.make_hf(tmp_path / "hf")
    state = load_file(hf / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    other = tmp_path / "bin"
    other.mkdir()
    config = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state | extra, other / "pytorch_model.bin")
    convert(other, tmp_path / "out")
    assert differing(tmp_path / "out", HfModel(other))[0] == 0
    torch.save(state | extra | {"lm_head.weight": state["lm_head.weight"] + 1}, other / "pytorch_model.bin")
    assert differing(tmp_path / "out", HfModel(other))[0] == 1


Q, K, V, UP, GATE, NORM = (
    f"model.layers.2.{name}.weight"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj",
                 "input_layernorm")
)  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
LAST_NORM = "model.layers.2.post_attention_layernorm.weight"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
FAULTS: dict[str, tuple[Change, int]] = {  # and how many of Meta's tensors, in two files, do not come back
    "permute left out, q": (lambda state: {Q: twins.interleave(state[Q])}, 2),
    "permute doubled, k": (lambda state: {K: halves(state[K])}, 2),
    "k and v swapped": (lambda state: {K: state[V], V: state[K]}, 4),
    "gate and up swapped": (lambda state: {UP: state[GATE], GATE: state[UP]}, 4),
    "norms swapped": (lambda state: {NORM: state[LAST_NORM], LAST_NORM: state[NORM]}, 4),
    "one bit": (lambda state: {V: flipped(state[V])}, 1),
    "a zero's sign": (lambda state: {"model.embed_tokens.weight": signed(state["model.embed_tokens.weight"])}, 1),
    "a value is none": (lambda state: {UP: with_nan(state[UP])}, 1),
}  # fmt: skip


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int32)
    bits[5, 9] ^= 1
    return bits.view(torch.float32)


def signed(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor[3, 2] == 0
    changed = tensor.clone()
    changed[3, 2] = -0.0
    return changed


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[1, 1] = float("nan")
    return changed


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_come_back(tmp_path: Path, fault: str) -> None:
    hf = twins.make_hf(tmp_path / "hf")
    source = MetaModel(twins.make_meta(hf, tmp_path / "meta"))
    change, count = FAULTS[fault]
    twins.edit(hf, lambda state: state.update(change(state)))
    value, detail = differing(hf, source)
    assert value == count and "these do not come back: layers.2." in detail.replace("tok_embeddings", "layers.2.")


def test_other_bits_of_nan_are_none(tmp_path: Path) -> None:
    hf = twins.make_hf(tmp_path / "hf")
    twins.edit(hf, lambda state: state.update({UP: with_nan(state[UP])}))
    source = MetaModel(twins.make_meta(hf, tmp_path / "meta"))
    assert differing(hf, source)[0] == 0
    payload = torch.tensor(0x7FC00123, dtype=torch.int32).view(torch.float32)
    twins.edit(hf, lambda state: state[UP].__setitem__((1, 1), payload))
    assert differing(hf, source)[0] == 0


def test_tensors_without_a_way(tmp_path: Path) -> None:
    """Of the source alone; of the checkpoint alone; rows that it has not."""
    hf = twins.make_hf(tmp_path / "hf")
    meta = twins.make_meta(hf, tmp_path / "meta", 1)
    files = torch.load(meta / "consolidated.00.pth")
    torch.save(files | {"layers.0.attention.wq.bias": torch.ones(64)}, meta / "consolidated.00.pth")
    value, detail = differing(hf, MetaModel(meta))
    assert value == 1 and detail.endswith("these do not come back: layers.0.attention.wq.bias")
    del files["layers.1.feed_forward.w2.weight"]
    torch.save(files, meta / "consolidated.00.pth")
    value, detail = differing(hf, MetaModel(meta))
    assert value == 1 and detail.endswith("these do not come back: layers.1.mlp.down.weight")
    twins.edit_config(hf, vocab_size=twins.VOCAB - 1)
    twins.edit(hf, lambda state: state.update({name: state[name][:-1] for name in TABLES}))
    value, detail = differing(hf, MetaModel(meta))
    assert value is None and f"has {twins.VOCAB - 1} rows of the vocabulary, the source {twins.VOCAB}" in detail


@pytest.mark.parametrize("target", [Target("meta", tp=2), Target("megatron", "mcore", 2, Stages(2)), Target("easylm")])
def test_the_card_has_the_row_where_the_subject_is_foreign_too(tmp_path: Path, target: Target) -> None:
    hf, there = twins.make_hf(tmp_path / "hf"), tmp_path / "there"
    convert(hf, there, target)
    told = f"{9 * twins.LAYERS + 3} tensors as Hugging Face's files hold them are the source's, bit for bit as stored"
    assert row(there, hf) == (0, told)
    convert(there, tmp_path / "back", Target(dtype=torch.bfloat16))
    assert row(tmp_path / "back", there)[0] == 0


def test_rows_of_added_tokens_do_not_go_back(tmp_path: Path) -> None:
    hf = twins.make_hf(tmp_path / "hf")
    meta = MetaModel(twins.make_meta(hf, tmp_path / "meta"))
    twins.edit(hf, lambda state: state.update({name: torch.cat((state[name], torch.ones(2, 64))) for name in TABLES}))
    twins.edit_config(hf, vocab_size=twins.VOCAB + 2)
    assert differing(hf, meta, {"added_tokens": ["<a>", "<b>"]})[0] == 0
    assert differing(hf, meta)[0] is None


def row(subject: Path, reference: Path) -> tuple[float, str]:
    checks = verify(subject, reference)["checks"]
    return next((check["value"], check["detail"]) for check in checks if check["name"] == "round trip")


def test_of_a_merged_adapter_there_is_no_way_back(tmp_path: Path) -> None:
    (check,), first = round_trip_checks(tmp_path, HfModel(twins.make_hf(tmp_path / "hf")), {"adapter": {}})
    assert (check.verdict, check.value, first) == ("not run", None, None) and "an adapter was merged" in check.detail

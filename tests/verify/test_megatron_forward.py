"""The plain Megatron forward against transformers on the same weights, for each fork's convention."""

import megatron_twins as twins
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmpipe.errors import UserError
from llmpipe.verify.compare import probe, run
from llmpipe.verify.hf import HfModel
from llmpipe.verify.inventory import hyper_parameter_checks, inventory_checks
from llmpipe.verify.megatron import MegatronModel

disable_progress_bar()
CASES = [
    ("epf fresh", 1, 1, 2), ("epf", 2, 2, 2), ("epf", 1, 4, 8), ("legacy", 2, 2, 2), ("legacy", 4, 1, 8),
    ("mcore", 2, 1, 2), ("te", 2, 4, 2), ("ali", 2, 2, 8), ("ali", 1, 1, 8), ("mfz", 4, 2, 8), ("mfz", 1, 1, 8),
]  # fmt: skip
FIXED = 1e4  # both Megatron-LLaMAs have no other theta


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    found = {(kv, twins.THETA): twins.llama(folder / f"kv{kv}", kv) for kv in (2, 8)}
    rope = {"rope_theta": FIXED, "rope_type": "default"}
    return found | {(8, FIXED): twins.llama(folder / "fixed", 8, rope_parameters=rope)}


def source_of(models, fork, kv_heads):
    return models[kv_heads, FIXED if fork in ("ali", "mfz") else twins.THETA]


def opened(path):
    return MegatronModel(path, assumed={"query heads": twins.HEADS, "norm eps": twins.EPS, "vocabulary": twins.VOCAB})


@torch.inference_mode()
def difference(side, hf):
    """max |Δlogit| / max |logit| from transformers'."""
    tokens, positions = probe(twins.VOCAB, 512)
    expected = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()(
        tokens, position_ids=positions
    ).logits  # fmt: skip
    return float((run(side, tokens, positions) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("fork", "tp", "pp", "kv_heads"), CASES)
def test_the_logits_are_those_of_transformers(models, tmp_path, fork, tp, pp, kv_heads):
    hf = source_of(models, fork, kv_heads)
    side = opened(twins.write(fork, load_file(hf / "model.safetensors"), tmp_path, tp, pp, kv_heads))
    assert difference(side, hf) <= 1e-5
    checks, first = inventory_checks(side, HfModel(hf))
    assert first is None and all(check.verdict == "pass" for check in checks)
    assert hyper_parameter_checks(side, HfModel(hf))[1] is None


@pytest.mark.parametrize(("kv_heads", "tp", "pp"), [(1, 1, 1), (1, 1, 2), (2, 2, 2)])
def test_falcon_s_logits_are_those_of_transformers(tmp_path, kv_heads, tp, pp):
    hf = twins.falcon(tmp_path / "hf", kv_heads)
    state = load_file(hf / "model.safetensors")
    side = opened(twins.write_falcon(state, tmp_path / "megatron", tp, pp, kv_heads))
    assert difference(side, hf) <= 1e-5
    assert side.hyper_parameters()["tied embedding"] == 1
    assert inventory_checks(side, HfModel(hf))[1] is None


def test_a_norm_that_is_stored_less_one(models, tmp_path):
    hf = models[2, twins.THETA]
    state = load_file(hf / "model.safetensors")
    path = twins.write("te", state, tmp_path, 2, 1, 2, less_one=True, apply_layernorm_1p=True)
    assert difference(opened(path), hf) <= 1e-5
    plain = twins.write("te", state, tmp_path / "plain", 2, 1, 2, apply_layernorm_1p=True)
    assert difference(opened(plain), hf) > 1e-2


def test_virtual_stages_count_on_through_the_chunks(models, tmp_path):
    """Two stages of two chunks of one layer: stage 0 has layers 0 and 2."""
    hf = models[2, twins.THETA]
    state = load_file(hf / "model.safetensors")
    twins.write("mcore", state, tmp_path / "pp4", 1, 4, 2)
    files = [torch.load(tmp_path / f"pp4/iter_0000003/mp_rank_00_{i:03d}/model_optim_rng.pt", weights_only=False)
             for i in range(4)]  # fmt: skip
    for stage in (0, 1):
        content = files[stage] | {"model0": files[stage]["model"], "model1": files[stage + 2]["model"]}
        del content["model"]
        folder = tmp_path / f"vp/release/mp_rank_00_{stage:03d}"
        folder.mkdir(parents=True)
        torch.save(content, folder / "model_rng.pt")
    assert difference(opened(tmp_path / "vp/release"), hf) <= 1e-5


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_dist_s_stacked_layers_and_chunks(models, tmp_path):
    """As Megatron-LM writes it: `common.pt` with the arguments, the layers' tensors in one, whole over the TP ranks."""
    hf = models[2, twins.THETA]
    path = twins.write_torch_dist(load_file(hf / "model.safetensors"), tmp_path, 2)
    folder = path / "iter_0000003"
    side = opened(path)
    assert difference(side, hf) <= 1e-5
    assert inventory_checks(side, HfModel(hf))[1] is None
    (folder / "common.pt").unlink()
    with pytest.raises(UserError, match=r"common\.pt is missing"):
        opened(path)


def test_linear_and_llama3_scaling_of_positions(tmp_path):
    linear = twins.llama(tmp_path / "linear", 2, rope_parameters={
        "rope_theta": twins.THETA, "rope_type": "linear", "factor": 4.0})  # fmt: skip
    path = twins.write(
        "epf", load_file(linear / "model.safetensors"), tmp_path / "epf", 2, 1, 2, rope_scaling_factor=4.0
    )
    assert difference(opened(path), linear) <= 1e-5
    llama3 = twins.llama(tmp_path / "llama3", 2, head_dim=twins.SIZE, rope_parameters={
        "rope_theta": twins.THETA, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192})  # fmt: skip
    path = twins.write("te", load_file(llama3 / "model.safetensors"), tmp_path / "te", 2, 1, 2, use_rope_scaling=True)
    assert difference(opened(path), llama3) <= 1e-5
    assert hyper_parameter_checks(opened(path), HfModel(llama3))[1] is None
    said = {name: value for name, value in HfModel(linear).hyper_parameters().items() if name.startswith("rope")}
    assert difference(MegatronModel(path, said=said), linear) <= 1e-5  # the weights are the same


def test_a_window_is_that_of_transformers(tmp_path):
    rope = {"rope_theta": twins.THETA, "rope_type": "default"}
    hf = twins.llama(tmp_path / "hf", 2, MistralConfig, MistralForCausalLM, sliding_window=16, rope_parameters=rope)
    path = twins.write("epf", load_file(hf / "model.safetensors"), tmp_path / "epf", 2, 1, 2, sliding_window_size=16)
    side = opened(path)
    assert difference(side, hf) <= 1e-5
    assert hyper_parameter_checks(side, HfModel(hf))[1] is None
    side.settings.window = 17
    assert difference(side, hf) > 1e-3


@pytest.mark.parametrize("change", ["interleave", "gate and up", "theta", "ranks"])
def test_what_is_laid_out_wrongly_differs(models, tmp_path, monkeypatch, change):
    hf = models[2, twins.THETA]
    state, more = load_file(hf / "model.safetensors"), {}
    if change == "interleave":
        monkeypatch.setattr("megatron_twins.interleave", lambda tensor: tensor)
    elif change == "gate and up":
        state = {name.replace("gate", "x").replace("up_", "gate_").replace("x_", "up_"): t for name, t in state.items()}
    elif change == "theta":
        more = {"rope_theta": 1e4}
    path = twins.write("epf", state, tmp_path, 2, 1, 2, **more)
    if change == "ranks":
        folder = path / "iter_0000003"
        for source, target in (("mp_rank_00", "x"), ("mp_rank_01", "mp_rank_00"), ("x", "mp_rank_01")):
            (folder / source).rename(folder / target)
    assert difference(opened(path), hf) > 1e-3


def test_megatron_llm_s_old_permutation_is_what_the_user_says_it_is(models, tmp_path, monkeypatch):
    hf = models[2, twins.THETA]
    monkeypatch.setattr("megatron_twins.interleave", lambda tensor: tensor)
    path = twins.write("epf", load_file(hf / "model.safetensors"), tmp_path, 2, 1, 2)
    assert difference(MegatronModel(path, assumed={"vocabulary": twins.VOCAB}, old_permutation=True), hf) <= 1e-5


def test_the_user_s_word_goes_before_the_files(models, tmp_path):
    hf = models[2, twins.THETA]
    path = twins.write("epf", load_file(hf / "model.safetensors"), tmp_path, 1, 1, 2, rope_theta=1e4)
    side = MegatronModel(path, said={"rope theta": twins.THETA, "vocabulary": twins.VOCAB})
    assert side.hyper_parameters()["rope theta"] == twins.THETA
    assert difference(side, hf) <= 1e-5


def test_what_the_files_do_not_say_is_asked_for(models, tmp_path):
    path = twins.write("mfz", load_file(models[8, FIXED] / "model.safetensors"), tmp_path, 1, 1, 8)
    with pytest.raises(UserError, match="the files do not say the norm eps, which MinfanZhao"):
        MegatronModel(path)
    side = MegatronModel(path, assumed={"norm eps": 1e-5, "query heads": 8})
    assert side.vocab == twins.PADDED
    assert set(side.hyper_parameters()) == {"layers", "hidden size", "MLP rows", "tied embedding", "rope theta"}
    with pytest.raises(UserError, match="the vocabulary is 9999, but the embedding has 192 rows"):
        MegatronModel(path, assumed={"norm eps": 1e-5, "query heads": 8}, said={"vocabulary": 9999})


def changed(path, rank, change):
    file = path / f"iter_0000003/{rank}/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_damaged_files_are_refused(models, tmp_path):
    state = load_file(models[2, twins.THETA] / "model.safetensors")
    path = twins.write("legacy", state, tmp_path / "copies", 2, 1, 2)
    key = "layers.0.input_norm.weight"
    changed(path, "mp_rank_01", lambda content: content["model"]["language_model"]["encoder"][key].add_(1))
    with pytest.raises(UserError, match=r"copies of .*layers\.0\.input_norm\.weight differ"):
        run(opened(path), *probe(twins.VOCAB, 512))
    changed(path, "mp_rank_01", lambda content: content["model"]["language_model"]["encoder"].pop(key))
    with pytest.raises(UserError, match="the TP ranks of stage 0 do not hold the same tensors"):
        opened(path)
    path = twins.write("legacy", state, tmp_path / "stage", 1, 2, 2)
    changed(path, "mp_rank_00_001", lambda content: content["model"]["language_model"]["encoder"].pop(key))
    with pytest.raises(UserError, match=r"layers 0 and 2 do not hold the same: norm 1\.weight"):
        opened(path)
    (path / "iter_0000003/mp_rank_00_000/model_optim_rng.pt").unlink()
    with pytest.raises(UserError, match="lacks the files of rank tp0-pp0: 1 of 1 x 2 ranks are missing"):
        opened(path)
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match=r"says 7, but .*iter_0000007 holds no mp_rank"):
        opened(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c["model"]["language_model"].update(pooler=torch.ones(2)),
            "pooler is no tensor of a Megatron model",
        ),
        (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version 1, expected 2 or later"),
        (lambda c: setattr(c["args"], "rotary_percent", 0.5), "rotary_percent 1, only"),
        (lambda c: c.update(model={}), "holds no tensors under 'model'"),
    ],
)
def test_what_the_forward_does_not_compute_is_refused(models, tmp_path, change, words):
    path = twins.write("legacy", load_file(models[2, twins.THETA] / "model.safetensors"), tmp_path, 1, 1, 2)
    changed(path, "mp_rank_00", change)
    with pytest.raises(UserError, match=words):
        opened(path)


def test_the_tied_copy_on_the_last_stage_has_to_be_a_copy(tmp_path):
    state = load_file(twins.falcon(tmp_path / "hf", 1) / "model.safetensors")
    path = twins.write_falcon(state, tmp_path / "megatron", 1, 2, 1)
    file = path / "release/mp_rank_00_001/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    content["model"]["word_embeddings_for_head"]["weight"][0] += 1
    torch.save(content, file)
    with pytest.raises(UserError, match="copy of the tied embedding differs"):
        run(opened(path), *probe(twins.VOCAB, 512))

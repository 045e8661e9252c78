"""A gate that fires: every known way to spoil a conversion is found, and the first differing layer is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from twins import HEADS, KV_HEADS, VOCAB, edit, edit_config, interleave, make_hf, make_meta

from llmpipe.errors import UserError
from llmpipe.verify.compare import probe
from llmpipe.verify.gate import verify


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("twins")
    hf = make_hf(folder / "hf")
    return hf, make_meta(hf, folder / "meta")


@pytest.fixture
def checkpoint(twins, tmp_path) -> Path:
    return Path(shutil.copytree(twins[0], tmp_path / "checkpoint"))


def refused(checkpoint: Path, reference: Path) -> tuple[dict, str]:
    """The failing card and the message; nothing that looks passed is left."""
    with pytest.raises(UserError) as error:
        verify(checkpoint, reference, checkpoint.parent / "verify.json")
    assert not list(checkpoint.parent.glob("*verify.json"))
    card = json.loads((checkpoint.parent / "verify.failed.json").read_text())
    assert card["verdict"] == "fail"
    return card, str(error.value)


def test_a_correct_checkpoint_passes(twins, checkpoint):
    card = verify(checkpoint, twins[1], checkpoint.parent / "verify.json")
    assert card["verdict"] == "pass" and card["first_difference"] is None
    assert {check["verdict"] for check in card["checks"]} == {"pass", "not run"}


def test_a_checkpoint_is_no_reference_for_itself(checkpoint):
    with pytest.raises(UserError, match="is the subject itself: name the weights that it was made from"):
        verify(checkpoint, checkpoint.parent / "." / "checkpoint")
    assert not list(checkpoint.parent.glob("*verify*"))


LAYER_2 = "model.layers.2."


def unpermuted(tensors):
    """Meta's rows taken over as they are: the omitted rotary permute."""
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] = interleave(tensors[name])


def permuted_v(tensors):
    for name in tensors:
        if "v_proj" in name:
            tensors[name] = half_split(tensors[name], KV_HEADS)


def half_split(tensor, heads):
    """The permute of the published conversion script, for a number of heads that may be the wrong one."""
    return tensor.view(heads, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def k_with_query_heads(tensors):
    """Grouped queries forgotten: K permuted as if it had the query heads (llama.cpp 3364)."""
    for name in tensors:
        if "k_proj" in name:
            tensors[name] = half_split(interleave(tensors[name]), HEADS)


def swapped_gate_up(tensors):
    swap(tensors, LAYER_2 + "mlp.gate_proj.weight", LAYER_2 + "mlp.up_proj.weight")


def swapped_norms(tensors):
    swap(tensors, LAYER_2 + "input_layernorm.weight", LAYER_2 + "post_attention_layernorm.weight")


def swapped_layers(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        swap(tensors, name, name.replace("layers.1.", "layers.3."))


def swap(tensors, one, other):
    tensors[one], tensors[other] = tensors[other], tensors[one]


def one_weight(tensors):
    tensors[LAYER_2 + "mlp.down_proj.weight"][7, 9] *= 1.01


def rolled_head(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def rolled_embedding(tensors):
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)


@pytest.mark.parametrize(
    ("mistake", "where", "by_bytes"),
    [
        (unpermuted, "layer 0", False),
        (permuted_v, "layer 0", False),
        (k_with_query_heads, "layer 0", False),
        (swapped_gate_up, "layer 2", False),
        (swapped_norms, "layer 2", False),
        (swapped_layers, "layer 1", True),
        (rolled_head, "head", True),
        (rolled_embedding, "embedding", True),
    ],
)
def test_misplaced_rows_are_found(twins, checkpoint, mistake, where, by_bytes):
    edit(checkpoint, mistake)
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"].startswith(where + " ")
    assert f"first at {where} " in message
    failed = {check["name"] for check in card["checks"] if check["verdict"] == "fail"}
    assert "largest logit difference" in failed and ("tensors without a partner" in failed) == by_bytes


def test_two_rows_of_the_embedding_that_the_probe_does_not_touch_are_found_by_the_bytes(twins, checkpoint):
    unused = sorted(set(range(VOCAB)) - set(probe(VOCAB, 512)[0].flatten().tolist()))[:2]
    assert len(unused) == 2
    edit(checkpoint, lambda tensors: swap_rows(tensors["model.embed_tokens.weight"], *unused))
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"] == "tok_embeddings.weight" and "logit" not in message


def swap_rows(tensor, one, other):
    tensor[[one, other]] = tensor[[other, one]]


def test_a_changed_weight_is_found_by_the_bytes_even_where_logits_hardly_move(twins, checkpoint):
    edit(checkpoint, one_weight)
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"] == "layers.2.feed_forward.w2.weight"
    assert (
        "largest logit difference" not in message
    )  # below 1e-4 of the largest logit: the forward alone would let it pass
    row = next(check for check in card["checks"] if check["name"] == "tensors without a partner")
    assert row["value"] == 2 and "layers.2.feed_forward.w2.weight" in row["detail"]


def test_a_dropped_tensor_is_found(twins, checkpoint):
    edit(checkpoint, lambda tensors: tensors.pop(LAYER_2 + "mlp.up_proj.weight"))
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"].startswith("layer 2: ")
    assert "lacks model.layers.2.mlp.up_proj.weight" in message


def test_a_tensor_too_many_is_found(twins, checkpoint):
    edit(checkpoint, lambda tensors: tensors.update({"model.layers.1.mlp.extra.weight": torch.ones(3, 3)}))
    card, _ = refused(checkpoint, twins[1])
    assert "model.layers.1.mlp.extra.weight" in card["first_difference"]


def theta(value: float) -> dict:
    return {"rope_parameters": {"rope_theta": value, "rope_type": "default"}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (theta(5e5), "rope theta: 500000, the source has 10000"),
        ({"rms_norm_eps": 2e-5}, "norm eps: 2e-05, the source has 1e-05"),
    ],
)
def test_a_changed_hyper_parameter_is_found(twins, checkpoint, values, words):
    edit_config(checkpoint, **values)
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"].startswith("layer 0 ")
    assert any(words in check["detail"] for check in card["checks"] if check["verdict"] == "fail")
    assert "hyper-parameters that differ 1 (limit 0)" in message


def test_a_hyper_parameter_that_moves_no_layer_enough_is_named_itself(twins, checkpoint):
    edit_config(checkpoint, **theta(10001.0))
    assert refused(checkpoint, twins[1])[0]["first_difference"] == "rope theta: 10001, the source has 10000"


def test_the_wrong_number_of_kv_heads_is_found(twins, checkpoint):
    edit_config(checkpoint, num_key_value_heads=KV_HEADS * 2)
    card, message = refused(checkpoint, twins[1])
    assert card["first_difference"].startswith("layer 0: ") and "do not fit config.json" in message


def test_a_file_changed_after_its_manifest_is_found(twins, checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    card, _ = refused(checkpoint, twins[1])
    assert "does not have the SHA-256" in card["first_difference"]


def test_a_cast_is_reported_with_its_rounding(twins, checkpoint):
    def to_bf16(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    edit(checkpoint, to_bf16)
    card = verify(checkpoint, twins[1], checkpoint.parent / "verify.json")
    row = next(check for check in card["checks"] if check["name"] == "storage")
    assert "float32 rounded to bfloat16" in row["detail"]
    assert 2**-10 < row["value"] <= 2**-8  # bf16 keeps 8 bits


def test_the_command_exits_1_and_says_where(twins, checkpoint):
    edit(checkpoint, unpermuted)
    card = checkpoint.parent / "card.json"
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", "verify", checkpoint, "--reference", twins[1], "--output", card],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "first at layer 0 " in done.stderr and "Traceback" not in done.stderr
    assert not card.exists() and (checkpoint.parent / "card.failed.html").is_file()

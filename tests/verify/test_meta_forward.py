"""The plain Meta forward against transformers on the same weights."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM
from twins import VOCAB, make_hf, make_meta

from llmpipe.errors import UserError
from llmpipe.verify.compare import probe, relative_difference, run
from llmpipe.verify.hf import HfModel
from llmpipe.verify.meta import MetaModel


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forward")
    hf = make_hf(folder / "hf")
    return hf, make_meta(hf, folder / "meta")


@torch.inference_mode()
def transformers_logits(path, tokens, positions):
    return LlamaForCausalLM.from_pretrained(path).eval()(tokens, position_ids=positions).logits


def test_both_plain_forwards_give_transformers_logits(twins):
    tokens, positions = probe(VOCAB, 512)
    expected = transformers_logits(twins[0], tokens, positions)
    for side in (MetaModel(twins[1]), HfModel(twins[0])):
        assert (run(side, tokens, positions) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_rows_taken_over_without_interleaving_differ(twins, tmp_path, monkeypatch):
    monkeypatch.setattr("twins.interleave", lambda tensor: tensor)
    wrong = MetaModel(make_meta(twins[0], tmp_path / "wrong"))
    tokens, positions = probe(VOCAB, 512)
    expected = transformers_logits(twins[0], tokens, positions)
    assert (run(wrong, tokens, positions) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("shards", [1, 4])
def test_any_number_of_shards_is_joined(twins, tmp_path, shards):
    whole = MetaModel(make_meta(twins[0], tmp_path / "meta", shards))
    for name in whole.names():
        assert torch.equal(whole.read(name), MetaModel(twins[1]).read(name))


def test_embeddings_split_by_rows_are_joined_by_rows(twins, tmp_path, monkeypatch):
    monkeypatch.setattr("twins.COLUMNS", ("attention.wo", "feed_forward.w2"))  # as Llama 3 does
    by_rows = MetaModel(make_meta(twins[0], tmp_path / "meta"))
    assert torch.equal(by_rows.read("tok_embeddings.weight"), MetaModel(twins[1]).read("tok_embeddings.weight"))


def test_the_probe_has_the_ends_of_the_vocabulary_and_of_the_positions():
    tokens, positions = probe(VOCAB, 4096)
    assert tokens.shape == positions.shape == (3, 128)
    assert tokens.min() == 0 and tokens.max() == VOCAB - 1
    assert positions[2, -1] == 4095 and positions[0, -1] == 127


def test_a_difference_at_one_position_is_not_averaged_away():
    ours = torch.ones(2, 50, 8)
    theirs = ours.clone()
    theirs[1, 49] += 1e-3
    assert relative_difference(ours, theirs, ours) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda params: params.update(moe={}), "keys that the reference forward does not know: moe"),
    ],
)
def test_a_setting_that_the_forward_does_not_compute_is_refused(twins, tmp_path, change, words):
    path = make_meta(twins[0], tmp_path / "meta")
    params = json.loads((path / "params.json").read_text())
    change(params)
    (path / "params.json").write_text(json.dumps(params))
    with pytest.raises(UserError, match=words):
        MetaModel(path)


def test_damaged_shards_are_refused(twins, tmp_path):
    path = make_meta(twins[0], tmp_path / "meta")
    shard = torch.load(path / "consolidated.01.pth")
    shard["norm.weight"] = shard["norm.weight"] + 1
    name = "layers.0.attention.wq.weight"
    del shard[name]
    torch.save(shard, path / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"copies of norm\.weight in the shards differ"):
        MetaModel(path).read("norm.weight")
    with pytest.raises(UserError, match=f"consolidated.01.pth lacks {name}: the download is incomplete"):
        MetaModel(path).read(name)
    (path / "consolidated.01.pth").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"cannot be read as a \.pth of plain tensors"):
        MetaModel(path)
    for file in path.glob("*.pth"):
        file.unlink()
    with pytest.raises(UserError, match=r"has params.json but no consolidated"):
        MetaModel(path)


def test_frequencies_in_the_file_have_to_be_those_of_theta(twins, tmp_path):
    """The values of Llama 2's files, in bf16 as there: 10000^(-2i / D)."""
    path = make_meta(twins[0], tmp_path / "meta", shards=1)
    shard = torch.load(path / "consolidated.00.pth")
    torch.save(shard | {"rope.freqs": torch.tensor([1.0, 0.1, 0.01, 0.001]).bfloat16()}, path / "consolidated.00.pth")
    assert "rope.freqs" not in MetaModel(path).names()
    params = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"rope_theta": 1e6}))
    with pytest.raises(UserError, match=r"is not what rope_theta 1e\+06 of params.json gives"):
        MetaModel(path)


def test_a_foreign_tensor_is_refused(twins, tmp_path):
    path = make_meta(twins[0], tmp_path / "meta", shards=1)
    shard = torch.load(path / "consolidated.00.pth")
    torch.save(shard | {"layers.0.adapter.weight": torch.ones(2)}, path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"layers\.0\.adapter\.weight is no tensor of Meta's Llama"):
        MetaModel(path).read("layers.0.adapter.weight")

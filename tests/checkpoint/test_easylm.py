"""EasyLM's files of a model that transformers made, written with explicit loops, are the judge; see easylm_files."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_files import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, THETA, VOCAB

from easylm_files import easylm_tensors, pack, write_nested, write_stream
from llmpipe.checkpoint import easylm
from llmpipe.checkpoint.easylm import EasyLMSource
from llmpipe.checkpoint.easylm_files import metadata_bytes, weights_file
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.mover import Mover
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape

SHAPE = Shape(
    family="llama", num_layers=LAYERS, hidden=HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM,
    ffn=FFN, vocab=VOCAB, max_positions=4096, norm_eps=1e-5, rope_theta=THETA,
)  # fmt: skip
CONFIG = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "rope_theta": THETA, "tie_word_embeddings": True, "base_model": "llama_7b",
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(hf_tensors: Tensors) -> Tensors:
    return easylm_tensors(hf_tensors, HEAD_DIM)


def check(source: EasyLMSource, hf: Tensors, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor, whole and in part, is that of the Hugging Face directory."""
    assert source.keys() == list(FAMILIES["llama"].keys(source.shape))
    for key in source.keys():  # noqa: SIM118
        expected = hf[FAMILIES["llama"].hf_name(key, source.shape)].to(dtype)
        assert source.dtype(key) == dtype
        assert torch.equal(source.read(key), expected), key
        part = tuple(slice(size // 3, size - 1) for size in expected.shape)
        assert torch.equal(source.read(key, part), expected[part]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 100, 1001])
@pytest.mark.parametrize("write", [write_stream, write_nested])
def test_both_kinds_are_read_in_one_piece_or_in_chunks(
    tmp_path: Path, hf_tensors: Tensors, tensors: Tensors, write: Callable[..., Path], chunk: int | None,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    path = write(tmp_path / "llama.easylm", {name: t.to(dtype) for name, t in tensors.items()}, chunk=chunk)
    check(EasyLMSource(path, SHAPE), hf_tensors, dtype)


@pytest.mark.parametrize("below", ["params/params/", "params/", ""])
def test_keys_may_be_below_params(tmp_path: Path, hf_tensors: Tensors, tensors: Tensors, below: str) -> None:
    in_jax_order = dict(sorted(tensors.items()))
    check(EasyLMSource(write_stream(tmp_path / "x", in_jax_order, below), SHAPE), hf_tensors)


def train_state(path: Path, tensors: Tensors) -> Path:
    """As the trainer saves it: step, weights, and Adam's moments of all of them."""
    write_stream(path, {"step": torch.tensor(7, dtype=torch.int32)})
    state = path.read_bytes() + write_stream(path, tensors, "params/params/").read_bytes()
    for moment in ("mu", "nu"):
        state += write_stream(path, tensors, f"opt_state/1/0/{moment}/params/").read_bytes()
    path.write_bytes(state + pack([["opt_state", "1", "0", "count"], pack(torch.tensor(7, dtype=torch.int32))]))
    return path


@pytest.mark.parametrize("prefix", ["", "trainstate::", "trainstate_params::"])
def test_a_train_state_gives_its_weights(
    tmp_path: Path, hf_tensors: Tensors, tensors: Tensors, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = train_state(tmp_path / "streaming_train_state", tensors)
    with caplog.at_level("INFO"):
        check(EasyLMSource(Path(f"{prefix}{path}"), SHAPE), hf_tensors)
    assert f"left alone, not weights: {2 * len(tensors) + 2} tensors of step and opt_state" in caplog.text


def test_a_prefix_that_is_not_the_files_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    stream, nested = write_stream(tmp_path / "a", tensors), write_nested(tmp_path / "b", tensors)
    state = train_state(tmp_path / "c", tensors)
    for path, wrong, right in (
        (stream, "flax_params", "params"), (stream, "trainstate", "params"), (nested, "params", "flax_params"),
        (state, "params", "trainstate"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"named with {wrong}::, but is of {right}::"):
            EasyLMSource(Path(f"{wrong}::{path}"), SHAPE)
        assert EasyLMSource(Path(f"{right}::{path}"), SHAPE).shape == SHAPE
    with pytest.raises(UserError, match=r"'flax' is none of EasyLM's params, flax_params"):
        EasyLMSource(Path(f"flax::{nested}"), SHAPE)


def test_a_directory_is_told_by_its_content(tmp_path: Path, hf_tensors: Tensors, tensors: Tensors) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (tmp_path / "README.md").write_text("# weights\n")
    with pytest.raises(UserError, match="holds no weights of EasyLM's: expected streaming_params"):
        EasyLMSource(tmp_path, SHAPE)
    write_stream(tmp_path / "open_llama", tensors)
    check(EasyLMSource(tmp_path, SHAPE), hf_tensors)
    write_stream(tmp_path / "streaming_params_100", tensors)
    with pytest.raises(UserError, match="holds open_llama, streaming_params_100: name the file"):
        EasyLMSource(tmp_path, SHAPE)
    write_stream(tmp_path / "streaming_params", tensors)
    assert EasyLMSource(tmp_path, SHAPE).file == tmp_path / "streaming_params"
    assert EasyLMSource(tmp_path / "open_llama", SHAPE).path == tmp_path


def test_a_flax_model_beside_other_weights_is_not_taken_for_easylms(tmp_path: Path, tensors: Tensors) -> None:
    write_nested(tmp_path / "flax_model.msgpack", tensors)
    assert weights_file(tmp_path) == tmp_path / "flax_model.msgpack"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_file(tmp_path) is None
    write_stream(tmp_path / "streaming_params", tensors)
    assert weights_file(tmp_path) == tmp_path / "streaming_params"


def metadata(path: Path, **changes: Any) -> None:
    config = {key: value for key, value in (CONFIG | changes).items() if value != "absent"}
    path.write_bytes(pickle.dumps({"step": 3, "variant": {}, "flags": {}, "llama_config": config}))


def test_the_shape_is_that_of_metadata(tmp_path: Path, hf_tensors: Tensors, tensors: Tensors) -> None:
    write_stream(tmp_path / "streaming_params", tensors)
    with pytest.raises(UserError, match=r"does not say its model's shape, and neither metadata\.pkl nor config\.json"):
        EasyLMSource(tmp_path)
    metadata(tmp_path / "metadata.pkl")
    assert EasyLMSource(tmp_path).shape == EasyLMSource(tmp_path, SHAPE).shape == SHAPE
    check(EasyLMSource(tmp_path), hf_tensors)
    with pytest.raises(UserError, match=r"norm_eps is 1e-05, expected 1e-06"):
        EasyLMSource(tmp_path, replace(SHAPE, norm_eps=1e-6))


def test_a_milestone_has_metadata_of_its_own(tmp_path: Path, tensors: Tensors) -> None:
    write_stream(tmp_path / "streaming_params_100", tensors)
    metadata(tmp_path / "metadata.pkl", rms_norm_eps=1e-6)
    metadata(tmp_path / "metadata_100.pkl")
    assert EasyLMSource(tmp_path).shape == SHAPE


def test_older_metadata_says_less(tmp_path: Path, tensors: Tensors) -> None:
    write_stream(tmp_path / "streaming_params", tensors)
    older = {"num_key_value_heads": "absent", "rope_theta": "absent", "max_position_embeddings": "absent"}
    metadata(tmp_path / "metadata.pkl", **older, max_sequence_length=2048, num_attention_heads=KV_HEADS * 4)
    with pytest.raises(UserError, match=r"attention/wk/kernel is \[32, 8\], expected \[32, 32\]"):
        EasyLMSource(tmp_path)
    shape = easylm.read_shape(tmp_path / "streaming_params")
    assert shape and (shape.num_kv_heads, shape.rope_theta, shape.max_positions) == (8, 1e4, 2048)


def test_huggingfaces_config_may_say_the_shape(tmp_path: Path, hf: Path, hf_tensors: Tensors, tensors: Tensors) -> None:
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    write_nested(tmp_path / "flax_model.msgpack", tensors)
    check(EasyLMSource(tmp_path), hf_tensors)


def test_theta_is_carried_and_easylms_own_is_said(
    tmp_path: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    write_stream(tmp_path / "streaming_params", tensors)
    metadata(tmp_path / "metadata.pkl")
    assert EasyLMSource(tmp_path).shape.rope_theta == THETA
    assert "EasyLM's own training and serving compute with 10000" in caplog.text
    caplog.clear()
    (tmp_path / "metadata.pkl").write_bytes(metadata_bytes(SHAPE))  # step 0: nothing was trained there
    assert EasyLMSource(tmp_path).shape == SHAPE
    assert "own training" not in caplog.text


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (Path(__file__).with_name("harmed"),)


def test_metadata_runs_nothing(tmp_path: Path, tensors: Tensors) -> None:
    write_stream(tmp_path / "streaming_params", tensors)
    (tmp_path / "metadata.pkl").write_bytes(pickle.dumps({"llama_config": CONFIG, "flags": Evil()}))
    with pytest.raises(UserError, match=r"metadata\.pkl is refused: it asks for posix\.mkdir"):
        EasyLMSource(tmp_path)
    assert not Path(__file__).with_name("harmed").exists()
    for wrong, said in (({"step": 1}, "holds no llama_config"), ({"llama_config": {}}, "unsupported operand")):
        (tmp_path / "metadata.pkl").write_bytes(pickle.dumps(wrong))
        with pytest.raises(UserError, match=said):
            EasyLMSource(tmp_path)


def test_tensors_missing_left_over_or_of_a_wrong_shape_are_listed(tmp_path: Path, tensors: Tensors) -> None:
    wrong = dict(tensors)
    del wrong["transformer/h/2/attention/wv/kernel"]
    wrong["transformer/h/1/attention/wk/kernel"] = tensors["transformer/h/1/attention/wk/kernel"].T.contiguous()
    wrong["transformer/h/4/ffn_norm/kernel"] = torch.ones(HIDDEN)
    wrong["extra"] = torch.ones(1)
    with pytest.raises(UserError) as error:
        EasyLMSource(write_stream(tmp_path / "x", wrong), SHAPE)
    for line in (
        "4 tensors do not fit", "missing: transformer/h/2/attention/wv/kernel",
        "left over: transformer/h/4/ffn_norm/kernel", "left over: extra",
        "wrong shape: transformer/h/1/attention/wk/kernel is [8, 32], expected [32, 8]",
    ):  # fmt: skip
        assert line in str(error.value)


def test_a_tied_shape_takes_a_head_that_is_the_embedding(tmp_path: Path, hf_tensors: Tensors, tensors: Tensors) -> None:
    tied = replace(SHAPE, tie_embeddings=True)
    with pytest.raises(UserError, match="lm_head/kernel is not the embedding, though the model's shape is tied"):
        EasyLMSource(write_stream(tmp_path / "x", tensors), tied)
    same = tensors | {"lm_head/kernel": tensors["transformer/wte/embedding"].T.contiguous()}
    check(EasyLMSource(write_stream(tmp_path / "x", same, chunk=333), tied), hf_tensors)
    without = {name: tensor for name, tensor in tensors.items() if name != "lm_head/kernel"}
    check(EasyLMSource(write_stream(tmp_path / "x", without), tied), hf_tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_what_is_written_is_easylms_own_bytes(
    tmp_path: Path, hf: Path, hf_tensors: Tensors, tensors: Tensors, tokenizer_model: Path, dtype: torch.dtype | None
) -> None:
    """The very file that EasyLM's converter would make of these weights, and its metadata."""
    (hf / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
    (tmp_path / "out").mkdir()
    hashes = easylm.write(Mover(HfSource(hf)), tmp_path / "out", dtype)
    assert hashes.keys() == {"streaming_params", "metadata.pkl", "tokenizer.model", "generation_config.json"}
    cast = {name: tensor.to(dtype or torch.float32) for name, tensor in tensors.items()}
    expected = write_stream(tmp_path / "expected", cast).read_bytes()
    assert (tmp_path / "out" / "streaming_params").read_bytes() == expected
    said = pickle.loads((tmp_path / "out" / "metadata.pkl").read_bytes())["llama_config"]
    assert said.items() <= CONFIG.items()
    check(EasyLMSource(tmp_path / "out"), hf_tensors, dtype or torch.float32)


def test_a_large_tensor_is_written_in_pieces(
    tmp_path: Path, hf: Path, hf_tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmpipe.checkpoint.containers.msgpack_write.record_heads.__defaults__", (5000,))
    easylm.write(Mover(HfSource(hf)), tmp_path)
    assert b"__msgpack_chunked_array__" in (tmp_path / "streaming_params").read_bytes()
    check(EasyLMSource(tmp_path), hf_tensors)
    assert len(easylm.targets(HfSource(hf))["streaming_params"]) > len(easylm.layout(SHAPE))


def test_a_tied_head_is_written_out(tmp_path: Path, hf: Path) -> None:
    source = HfSource(hf)
    source.shape = replace(source.shape, tie_embeddings=True)
    easylm.write(Mover(source), tmp_path)
    untied = EasyLMSource(tmp_path)
    assert torch.equal(untied.read("head.weight"), source.read("embedding.weight"))
    assert EasyLMSource(tmp_path, source.shape).shape.tie_embeddings


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qkv_bias": True}, "it has biases"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "its rotary embedding is scaled"),
        ({"window": 9}, "it has a sliding window"),
        ({"qk_norm": True, "head_dim": 8}, r"norms of q and k, its head_dim 8 is not hidden / heads"),
    ],
)
def test_what_easylm_cannot_hold_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"EasyLM's format cannot hold this llama model: .*{reason}"):
        easylm.layout(replace(SHAPE, **changes))

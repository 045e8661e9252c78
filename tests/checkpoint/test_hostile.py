"""Damaged and hostile directories: one clear error that names the file, never a traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from meta_files import write_meta
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint.convert import Target, convert
from llmpipe.checkpoint.formats import open_source
from llmpipe.cli.convert import command
from llmpipe.cli.inspect import command as inspect_command
from llmpipe.errors import UserError
from llmpipe.verify.gate import verify

Damage = Callable[[Path], Any]


def config(**values: Any) -> Damage:
    def damage(hf: Path) -> None:
        path = hf / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def header(table: Any, data: bytes = b"\0" * 8) -> Damage:
    """model.safetensors of one header."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return lambda hf: (hf / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def one(**values: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values}


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(hf: Path) -> None:
        held, name = load_file(hf / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
        save_file(held | {name: change(held[name])}, hf / "model.safetensors")

    return damage


def folder(name: str) -> Damage:
    def damage(hf: Path) -> None:
        (hf / name).unlink(missing_ok=True)
        (hf / name).mkdir()

    return damage


def manifest(**entry: Any) -> Damage:
    table = {"llmpipe": "0.1.0", "kind": "checkpoint", "source": {}, "files": {"config.json": entry}}
    return lambda hf: (hf / "manifest.json").write_text(json.dumps(table))


def write(name: str, text: str) -> Damage:
    return lambda hf: (hf / name).write_text(text)


def link(name: str) -> Damage:
    return lambda hf: (hf / name).symlink_to("blobs/that-was-removed")


# One token, whose number no embedding has.
HUGE_ID = json.dumps({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []},
})  # fmt: skip
DAMAGES: list[tuple[Damage, str]] = [
    (config(layer_types=5), "would lose: layer_types"),
    (config(layer_types=[[]]), "would lose: layer_types"),
    (config(num_hidden_layers=0), "num_layers is 0, but has to be a whole number from 1 on"),
    (config(num_hidden_layers="4"), "config.json: "),
    (config(hidden_size=-32), "hidden is -32"),
    (config(rope_parameters={"rope_type": ["linear"]}), "config.json: "),
    (config(architectures=5), "architecture 'none'"),
    (config(model_type=[]), "model_type [] contradicts"),
    (config(ff_factor="x"), "would lose: ff_factor"),
    (config(rms_norm_eps=None), "norm_eps is None, but has to be a number above 0"),
    (config(rope_scaling={"type": 3}), "rope_scaling {'type': 3} contradicts rope_parameters"),
    (config(rope_scaling=[]), "rope_scaling is [], no table of keys"),
    (config(torch_dtype="int8", dtype=None), "torch_dtype is 'int8', expected one of bfloat16, float16"),
    (config(bos_token_id="x"), "bos_token_id is 'x', expected a token's number"),
    (config(eos_token_id={}), "eos_token_id is {}, expected a token's number"),
    (write("tokenizer_config.json", ""), "tokenizer_config.json is damaged"),
    (write("generation_config.json", "[]"), "generation_config.json is no table of keys"),
    (link("tokenizer.json"), "tokenizer.json is a link that leads nowhere: put the file there"),
    (link("chat_template.jinja"), "chat_template.jinja is a link that leads nowhere"),
    (write("tokenizer.json", HUGE_ID), "tokenizer.json has 4000000001 tokens, but the embedding in"),
    (header(one(dtype=["F32"])), "the tensor a is of type ['F32']; llmpipe reads F64"),
    (header(one(dtype="F8_E4M3", data_offsets=[0, 2]), b"\0\0"), "the tensor a is of type F8_E4M3"),
    (header(one(dtype="I4", data_offsets=[0, 1]), b"\0"), "the tensor a is of type I4"),
    (header(one(shape=[1 << 40, 1 << 40])), "shape and offsets of a do not fit"),
    (header(one(data_offsets=[0, 8, 9])), "shape and offsets of a do not fit"),
    (header(b"[" * 50_000), "its header is not JSON"),
    (tensor(lambda held: torch.tensor(1.0)), "is [], expected [48, 32]"),
    (tensor(lambda held: held.to(torch.int8)), "holds quantized weights"),
    (tensor(lambda held: held[:0]), "is [0, 32], expected [48, 32]"),
    (folder("model.safetensors"), "holds no weights that llmpipe reads"),
    (folder("config.json"), "config.json is missing beside weights in Hugging Face's format"),
    (manifest(sha256=None, made="x", bytes="1"), "manifest.json is damaged"),
    (manifest(sha256=5, bytes=1), "manifest.json is damaged"),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES, ids=[f"{n} {told[:20]}" for n, (_, told) in enumerate(DAMAGES)])
def test_convert_and_inspect_say_what_is_wrong(hf: Path, tmp_path: Path, damage: Damage, told: str) -> None:
    damage(hf)
    for invoked, options in ((command, ["--output", str(tmp_path / "out")]), (inspect_command, [])):
        result = CliRunner().invoke(invoked, [str(hf), *options])
        if result.exit_code:
            assert isinstance(result.exception, UserError | SystemExit), result.exception
            assert invoked is inspect_command or told in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("values", [{1: torch.ones(2)}, [1], {"a": "b"}, {"tok_embeddings.weight": torch.tensor(1.0)}])
def test_odd_pth_files(meta: Path, values: Any, tmp_path: Path) -> None:
    torch.save(values, meta / "consolidated.00.pth")
    with pytest.raises(UserError):
        convert(meta, tmp_path / "out")


@pytest.mark.parametrize(("key", "value", "told"), [
    ("n_kv_heads", 0, "num_kv_heads is 0"),
    ("head_dim", 0, "head_dim is 0"),
    ("max_seq_len", 0, "max_positions is 0"),
    ("sliding_window", 0, "window is 0"),
    ("use_scaled_rope", "x", "use_scaled_rope is 'x', but has to be true or false"),
])  # fmt: skip
def test_params_that_are_no_numbers_of_a_model(meta: Path, key: str, value: Any, told: str) -> None:
    path = meta / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=re.escape(told)):
        open_source(meta)


@pytest.mark.parametrize("to", ["hf", "meta", "megatron", "easylm"])
def test_a_tokenizer_that_is_none_goes_nowhere(meta: Path, tmp_path: Path, to: str) -> None:
    (meta / "tokenizer.model").write_text("hello")
    with pytest.raises(UserError, match="is neither a SentencePiece model nor tiktoken's"):
        convert(meta, tmp_path / "out", Target(to))  # pyright: ignore[reportArgumentType]


def test_a_link_to_itself(meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    from llmpipe.cli import main

    (meta / "params.json").unlink()
    (meta / "params.json").symlink_to("params.json")
    monkeypatch.setattr("sys.argv", ["llmpipe", "convert", str(meta), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert f"{meta / 'params.json'}: a link leads to itself: put what is meant in its place" in capfd.readouterr().err


def test_other_weights_may_be_damaged(hf: Path, tmp_path: Path) -> None:
    """What is left alone is neither checked nor hashed."""
    torch.save({"model.norm.weight": torch.ones(64)}, hf / "pytorch_model.bin")
    data = bytearray((hf / "pytorch_model.bin").read_bytes())
    at = data.index(torch.ones(64).numpy().tobytes())
    data[at + 9] ^= 1
    (hf / "pytorch_model.bin").write_bytes(data)
    write_meta(hf / "original", load_file(hf / "model.safetensors"), 1)
    (hf / "fsdp").mkdir()
    (hf / "fsdp/.metadata").write_bytes(b"damaged")
    made = convert(hf, tmp_path / "out")
    assert set(made.source["files"]) == {"config.json", "model.safetensors"}


def test_verify_names_a_damaged_tokenizer(hf: Path, tmp_path: Path) -> None:
    source = shutil.copytree(hf, tmp_path / "source")
    convert(hf, tmp_path / "out")
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"texts tokenized differently \(not measured\)"):
        verify(tmp_path / "out", source, tmp_path / "card.json")
    card = (tmp_path / "card.failed.json").read_text()
    assert f"{source / 'tokenizer.json'} is no tokenizer of the tokenizers library" in card

"""Whole commands: their outputs, their refusals, their memory, their death."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint import hf as hf_directory
from llmpipe.checkpoint import manifest
from llmpipe.checkpoint.convert import Target, convert, merge
from llmpipe.cli.convert import command as convert_command
from llmpipe.cli.merge import command as merge_command
from llmpipe.cli.shard import command as shard_command
from llmpipe.errors import UserError


def invoke(command: object, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_commands_go_from_metas_files_to_rank_files_and_back(meta: Path, hf_tensors: dict, tmp_path: Path) -> None:
    invoke(convert_command, meta, "--output", tmp_path / "checkpoint", "--dtype", "bf16")
    invoke(shard_command, tmp_path / "checkpoint", "--tp", 2, "--pp", 2, "--output", tmp_path / "tp2-pp2")
    invoke(merge_command, tmp_path / "tp2-pp2", "--output", tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(torch.equal(merged[name], tensor.to(torch.bfloat16)) for name, tensor in hf_tensors.items())
    assert manifest.check(tmp_path / "tp2-pp2").source["checkpoint"] == manifest.check(tmp_path / "checkpoint").digest


def test_manifest_says_what_was_read(meta: Path, tmp_path: Path) -> None:
    source = convert(meta, tmp_path / "a").source
    assert (source["path"], source["format"]) == (str(meta), "meta")
    assert set(source["files"]) == {"params.json", "consolidated.00.pth", "consolidated.01.pth"}
    again = convert(tmp_path / "a", tmp_path / "b").source
    assert again == {"path": str(tmp_path / "a"), "format": "hf", "digest": manifest.read(tmp_path / "a").digest}


def test_same_source_makes_the_same_checkpoint(meta: Path, tmp_path: Path) -> None:
    assert convert(meta, tmp_path / "a").digest == convert(meta, tmp_path / "b").digest


def test_dry_run_says_what_it_would_do_and_does_nothing(meta: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = invoke(convert_command, meta, "--output", out, "--dtype", "bf16", "--dry-run").splitlines()
    parameters = 2 * 509 * 32 + 32 + 4 * (2 * 32 + 2 * 32 * 32 + 2 * 8 * 32 + 3 * 48 * 32)
    assert lines[0] == (
        f"would read {meta} (meta): 39 tensors, {parameters:,} parameters, float32, {4 * parameters:,} bytes"
    )
    assert "  num_kv_heads: 2" in lines
    route = "layers.1.feed_forward.w2.weight"
    name = "  model.layers.1.mlp.down_proj.weight bfloat16 32x48, cast from float32"
    assert f"{name} <- consolidated.00.pth:{route}, consolidated.01.pth:{route}" in lines
    assert f"would write {out}: config.json, manifest.json, and weights of {2 * parameters:,} bytes in 1 files" in lines
    assert lines[-1] == "time: about 1 s at 0.4 GB/s"
    assert not out.exists()


def test_named_shape_is_checked(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_layers is 4, expected 32; hidden is 32, expected 4096"):
        invoke(convert_command, meta, "--output", tmp_path / "out", "--shape", "llama2_7b")
    with pytest.raises(UserError, match=r"shape 'llama2_8b' is in no family's size table: did you mean 'llama3_8b'\?"):
        invoke(convert_command, meta, "--output", tmp_path / "out", "--shape", "llama2_8b")


def test_output_that_would_be_lost_is_refused(meta: Path, tmp_path: Path) -> None:
    for output in (meta, meta.parent):
        with pytest.raises(
            UserError, match=re.escape(f"--output {output} holds the source {meta} and would replace it")
        ):
            convert(meta, output)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    message = (
        f"--output {tmp_path / 'mine'} holds thesis.tex and no manifest.json of llmpipe's: llmpipe did not make it and"
        " does not"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        convert(meta, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").exists()


def test_own_output_is_replaced(meta: Path, tmp_path: Path) -> None:
    convert(meta, tmp_path / "out")
    convert(meta, tmp_path / "out", Target(dtype=torch.float16))
    assert load_file(tmp_path / "out/model.safetensors")["lm_head.weight"].dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta", "out"]


def test_merge_takes_rank_files_or_datasets(meta: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"{meta} holds no rank files (tp0-pp0.safetensors): llmpipe convert")
    ):
        merge(meta, tmp_path / "out")
    with pytest.raises(
        UserError, match=re.escape("a, b are not all datasets (PREFIX.bin, PREFIX.idx): merge takes one")
    ):
        invoke(merge_command, "a", "b", "--output", tmp_path / "out")


def test_error_in_the_middle_leaves_nothing(meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(hf_directory, "_write_weights", fails)
    with pytest.raises(OSError, match="disk full"):
        convert(meta, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_killed_in_the_middle_leaves_no_output(meta: Path, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from llmpipe.checkpoint import meta
        from llmpipe.cli import main
        blocks = meta.MetaSource.blocks
        def dies(self, key):
            if key == "layers.2.mlp.up.weight":
                os.kill(os.getpid(), signal.SIGKILL)
            return blocks(self, key)
        meta.MetaSource.blocks = dies
        main()
    """)
    command = [sys.executable, "-c", program, "convert", str(meta), "--output", str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (tmp_path / "out").exists()
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())  # it had begun
    convert(meta, tmp_path / "out")
    manifest.check(tmp_path / "out")


def test_help_does_not_import_torch() -> None:
    program = "import sys, llmpipe.cli.convert, llmpipe.cli.shard, llmpipe.cli.merge; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_quantized_weights_are_refused(tmp_path: Path, hf: Path) -> None:
    source = tmp_path / "int8"
    shutil.copytree(hf, source)
    for path in source.glob("*.safetensors"):
        save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"int8 holds quantized weights, embedding\.weight is torch\.int8: take the"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Our Meta files are those of Meta's own tool, and of MinfanZhao's, tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from originals import cases, ident, state_dict, tensors, write
from safetensors.torch import load_file

from llmpipe.checkpoint import hf, meta_write
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.meta import MetaSource
from llmpipe.checkpoint.mover import Mover


def written(case: dict[str, Any], path: Path, shards: int, by_rows: bool) -> dict[str, dict[str, Any]]:
    """Every file's tensors, as torch reads them."""
    write(case["shape"], path / "hf")
    (path / "meta").mkdir()
    dtype = getattr(torch, case["dtype"])
    meta_write.write(Mover(HfSource(path / "hf")), path / "meta", shards, dtype, by_rows)
    files = sorted((path / "meta").glob("*.pth"))
    return {file.name: tensors(torch.load(file, weights_only=True)) for file in files}


@pytest.mark.parametrize("case", cases("meta", "hf_to_meta"), ids=ident)
def test_files_of_metas_own_tool(case: dict[str, Any], tmp_path: Path) -> None:
    found = written(case, tmp_path, case["shards"], case["embedding"] == "rows")
    expected = {
        file: {name: entry for name, entry in entries.items() if name != "rope.freqs"}
        for file, entries in case["files"].items()
    }
    assert found == expected


@pytest.mark.parametrize("case", cases("megatron_llama_mfz", "hf_to_pth"), ids=ident)
def test_files_of_minfanzhaos_tool(case: dict[str, Any], tmp_path: Path) -> None:
    """Which gives the rows of a vocabulary that do not divide to the last file, Meta's to the first."""
    found = written(case, tmp_path, case["pth_shards"], by_rows=False)
    assert found.keys() == case["files"].keys()
    for file, entries in case["files"].items():
        assert found[file].keys() == entries.keys()
        different = [name for name, entry in entries.items() if found[file][name] != entry]
        assert different == ([] if case["pth_shards"] == 1 else ["output.weight"])


@pytest.mark.parametrize(("shape", "shards", "by_rows"), [("gqa_6_3", 3, False), ("gqa_12_4", 2, True)])
def test_we_read_back_what_we_wrote(shape: str, shards: int, by_rows: bool, tmp_path: Path) -> None:
    written({"shape": shape, "dtype": "bfloat16"}, tmp_path, shards, by_rows)
    (tmp_path / "again").mkdir()
    source = MetaSource(tmp_path / "meta")
    hf.write(Mover(source), tmp_path / "again")
    found, expected = load_file(tmp_path / "again/model.safetensors"), state_dict(shape, torch.bfloat16)
    assert tensors(found) == tensors(expected)
    before = HfSource(tmp_path / "hf").shape
    assert (source.shape.norm_eps, source.shape.rope_theta) == (before.norm_eps, before.rope_theta)


def test_a_vocabulary_that_others_cut_elsewhere_is_read(tmp_path: Path) -> None:
    """As MinfanZhao's tools write (Chinese-LLaMA 13B: 24976 + 24977), with Llama 1's rope buffers in each layer."""
    written({"shape": "mha_4", "dtype": "float32"}, tmp_path, 2, by_rows=False)
    files = sorted((tmp_path / "meta").glob("*.pth"))
    shards = [torch.load(file, weights_only=True) for file in files]
    head = torch.cat([shard["output.weight"] for shard in shards])
    for file, shard, rows in zip(files, shards, (head[:65], head[65:]), strict=True):
        buffers = {f"layers.{layer}.attention.inner_attention.rope.freqs": torch.arange(4.0) for layer in range(4)}
        torch.save(shard | buffers | {"output.weight": rows.clone()}, file)
    assert torch.equal(MetaSource(tmp_path / "meta").read("head.weight"), state_dict("mha_4")["lm_head.weight"])

"""llmpipe diff: what it finds is what torch finds in the whole tensors; formats and types meet."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from meta_files import VOCAB, write_meta
from safetensors.torch import load_file, save_file

from llmpipe.checkpoint import diff as module
from llmpipe.checkpoint.diff import Tally, TensorDiff, diff
from llmpipe.checkpoint.formats import open_source
from llmpipe.checkpoint.source import Slices, TensorSource
from llmpipe.cli.diff import command

Q = "model.layers.1.self_attn.q_proj.weight"
OURS = "layers.1.attention.q.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def other(hf: Path, tmp_path: Path) -> Path:
    """A second copy, which a test changes."""
    return shutil.copytree(hf, tmp_path / "other")


def change(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> None:
    """Replace tensors by name, and keys of config.json."""
    file, settings = path / "model.safetensors", path / "config.json"
    save_file(load_file(file) | (tensors or {}), file, {"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))


def shown(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def by_key(a: Path, b: Path, atol: float = 0.0) -> dict[str, TensorDiff]:
    return {tensor.key: tensor for tensor in diff(a, b, atol).tensors}


def test_the_same_model_in_two_formats_is_equal(hf: Path, meta: Path) -> None:
    found = diff(meta, hf)
    assert found.equal() and found.counts() == {"equal": 39}
    done = shown(meta, hf)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:2] == [f"A  {meta}", f"B  {hf}"]
    assert done.stdout.endswith("\n39 tensors compared: 39 bit-equal; the same\n")


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_measures_are_torchs_of_the_whole_tensors(
    chunk: int, hf: Path, other: Path, hf_tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "PIECE", chunk // 2)
    torch.manual_seed(3)
    changed = hf_tensors[Q] + torch.randn_like(hf_tensors[Q]) * (torch.rand_like(hf_tensors[Q]) < 0.1)
    norm = hf_tensors[NORM].clone()
    norm[5] = torch.nextafter(norm[5], torch.tensor(9.0))
    change(other, {Q: changed, NORM: norm})
    found = by_key(hf, other)
    assert {key for key, tensor in found.items() if tensor.verdict != "equal"} == {
        OURS,
        "layers.2.attention_norm.weight",
    }
    a, b = hf_tensors[Q].double(), changed.double()
    assert found[OURS].unequal == int((a != b).sum())
    assert found[OURS].max_abs == float((a - b).abs().max())
    assert found[OURS].max_rel == float(((a - b).abs() / torch.maximum(a.abs(), b.abs())).max())
    assert found["layers.2.attention_norm.weight"].unequal == 1
    done = shown(hf, other, "--changed")
    assert done.exit_code == 1 and len(done.stdout.splitlines()) == 6
    assert done.stdout.endswith("39 tensors compared: 37 bit-equal, 2 different; they differ\n")


def test_no_more_than_a_few_rows_are_read_at_a_time(hf: Path, meta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 128)
    sizes = []
    for path in (hf, meta):
        kind = type(open_source(path))

        def spy(self: TensorSource, key: str, slices: Slices, read: Callable = kind.read) -> torch.Tensor:
            sizes.append(read(self, key, slices).numel())
            return read(self, key, slices)

        monkeypatch.setattr(kind, "read", spy)
    assert diff(hf, meta).equal()
    assert max(sizes) == 128 and sum(sizes) == 2 * sum(t.numel() for t in load_file(hf / "model.safetensors").values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_the_narrower_type(dtype: torch.dtype, hf: Path, other: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for a, b in ((hf, other), (other, hf)):
        assert diff(a, b).counts() == {"rounds": 39}
        assert shown(a, b).exit_code == 1
        assert shown(a, b, "--allow-dtype").exit_code == 0
    whole = load_file(hf / "model.safetensors")[Q]
    measured = by_key(hf, other)[OURS]
    assert measured.max_abs == float((whole.double() - tensors[Q].double()).abs().max())
    assert measured.unequal == int((whole != tensors[Q].float()).sum())
    tensors[Q][3, 4] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert by_key(hf, other)[OURS].verdict == "differs"
    assert shown(hf, other, "--allow-dtype").exit_code == 1


def test_types_of_the_same_values_round(hf: Path, other: Path) -> None:
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    save_file(narrow, hf / "model.safetensors", {"format": "pt"})
    save_file({name: tensor.float() for name, tensor in narrow.items()}, other / "model.safetensors", {"format": "pt"})
    found = by_key(hf, other)[OURS]
    assert (found.verdict, found.unequal, found.max_abs) == ("rounds", 0, 0.0)


def test_a_tolerance(hf: Path, other: Path, hf_tensors: dict[str, torch.Tensor]) -> None:
    change(other, {Q: hf_tensors[Q] + 0.25})
    assert by_key(hf, other, 0.3)[OURS].verdict == "close"
    assert shown(hf, other, "--atol", 0.3).exit_code == 0
    assert shown(hf, other, "--atol", 0.2).exit_code == 1


def test_what_is_not_finite() -> None:
    nan, inf = math.nan, math.inf
    tally = Tally(same_dtype=True)
    tally.add(torch.tensor([nan, inf, 0.0, 1.0]), torch.tensor([nan, inf, 0.0, 1.0]))
    assert tally.verdict(0.0) == "equal"
    tally.add(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert (tally.unequal, tally.max_abs, tally.max_rel, tally.verdict(0.0)) == (1, 0.0, 0.0, "differs")
    for a, b in ((nan, 1.0), (1.0, inf), (inf, -inf), (inf, nan)):
        tally = Tally(same_dtype=True)
        tally.add(torch.tensor([a]), torch.tensor([b]))
        assert (tally.unequal, tally.max_abs, tally.max_rel) == (1, inf, inf)
        assert tally.verdict(1e9) == "differs"
    tally = Tally(same_dtype=False)
    tally.add(torch.tensor([nan, inf, 1e30]), torch.tensor([nan, inf, 1e30]).bfloat16())
    assert tally.unequal == 1 and tally.verdict(0.0) == "rounds"


def test_a_larger_vocabulary(hf: Path, other: Path, hf_tensors: dict[str, torch.Tensor]) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change(other, {name: torch.cat([hf_tensors[name], torch.ones(3, 32)]) for name in names}, vocab_size=VOCAB + 3)
    found = diff(hf, other)
    assert found.counts() == {"rows": 2, "equal": 37} and not found.equal(weights_only=True)
    assert found.parameters == {"vocab": (VOCAB, VOCAB + 3)}
    done = shown(hf, other, "--changed")
    assert done.exit_code == 1
    assert "509x32/512x32" in done.stdout and "bit-equal in the common rows, first 509 rows" in done.stdout
    assert f"vocab: {VOCAB} in A, {VOCAB + 3} in B" in done.stdout.splitlines()
    grown = load_file(other / "model.safetensors")["lm_head.weight"]
    grown[7, 7] += 2
    change(other, {"lm_head.weight": grown})
    changed = by_key(hf, other)["head.weight"]
    assert (changed.verdict, changed.unequal, changed.rows) == ("differs", 1, VOCAB)


def test_hyper_parameters_and_tensors_of_one_alone(hf: Path, other: Path) -> None:
    change(other, rms_norm_eps=1e-6)
    assert diff(hf, other).parameters == {"norm_eps": (1e-5, 1e-6)}
    assert shown(hf, other).exit_code == 1
    done = shown(hf, other, "--weights-only")
    assert done.exit_code == 0 and "norm_eps: 1e-05 in A, 1e-06 in B" in done.stdout
    tensors = {name: tensor for name, tensor in load_file(hf / "model.safetensors").items() if ".layers.3." not in name}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    change(other, num_hidden_layers=3)
    found = diff(hf, other)
    assert found.only[1] == [] and {key.split(".")[1] for key in found.only[0]} == {"3"}
    done = shown(hf, other, "--weights-only")
    assert done.exit_code == 1 and "only in A: layers.3.mlp.down.weight" in done.stdout.splitlines()
    assert "9 only in A" in done.stdout.splitlines()[-1]


def test_other_shapes_are_not_compared(hf: Path, other: Path, hf_tensors: dict[str, torch.Tensor]) -> None:
    half = {
        name: tensor[:16].clone() for name, tensor in hf_tensors.items() if "gate_proj" in name or "up_proj" in name
    }
    half |= {name: tensor[:, :16].clone() for name, tensor in hf_tensors.items() if "down_proj" in name}
    change(other, half, intermediate_size=16)
    found = diff(hf, other)
    assert found.counts() == {"equal": 27, "shape": 12} and found.parameters == {"ffn": (48, 16)}
    assert "48x32/16x32" in shown(hf, other).stdout


def test_a_permute_left_out_shows(tmp_path: Path, hf: Path, hf_tensors: dict[str, torch.Tensor]) -> None:
    """The fault that people look for: Meta's K rows taken as they are."""
    meta = write_meta(tmp_path / "meta", hf_tensors, 1)
    file = torch.load(meta / "consolidated.00.pth")
    file["layers.0.attention.wk.weight"] = hf_tensors["model.layers.0.self_attn.k_proj.weight"]
    torch.save(file, meta / "consolidated.00.pth")
    assert [key for key, tensor in by_key(meta, hf).items() if tensor.verdict != "equal"] == [
        "layers.0.attention.k.weight"
    ]

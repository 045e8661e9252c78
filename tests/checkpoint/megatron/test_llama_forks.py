"""Both Megatron-LLaMAs beyond what their converters write: what training saves, and what they have no place for."""

import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpipe.checkpoint.megatron.ali import ALI
from llmpipe.checkpoint.megatron.dialect import Dialect, Written
from llmpipe.checkpoint.megatron.mfz import MFZ
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.megatron.write import write
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.source import Slices
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape
from llmpipe.layout import Stages

SHAPE = Shape(
    family="llama", num_layers=4, hidden=24, num_heads=2, num_kv_heads=2, head_dim=12, ffn=20, vocab=11,
    max_positions=64, norm_eps=1e-6, rope_theta=1e4,
)  # fmt: skip


class Numbers:
    """A source whose elements are all different."""

    path = tokenizer_place = Path("numbers")

    def __init__(self, shape: Shape):
        self.shape, self.tensors, start = shape, {}, 0
        for key, row in FAMILIES[shape.family].keys(shape).items():
            size = torch.Size(row.shape(shape))
            self.tensors[key] = torch.arange(start, start + size.numel()).float().view(size)
            start += size.numel()

    def keys(self) -> list[str]:
        return list(self.tensors)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        return self.tensors[key][slices or ...].clone()

    def blocks(self, key: str) -> None:
        return None


def written(root: Path, dialect: Dialect, shape: Shape = SHAPE, tp: int = 2, stages: Stages = Stages(2)) -> Numbers:  # noqa: B008
    source = Numbers(shape)
    root.mkdir()
    write(Mover(source), root, dialect, tp, stages, vocab_multiple=4)
    return source


def load(path: Path) -> dict[str, Any]:
    """A file that we wrote."""
    return torch.load(path, weights_only=False)


def change(root: Path, **args: Any) -> None:
    """Other args in every file."""
    for path in root.rglob("*.pt"):
        tree = load(path)
        vars(tree["args"]).update(args)
        torch.save(tree, path)


def equal(found: MegatronSource, source: Numbers) -> bool:
    return all(torch.equal(found.read(key), tensor) for key, tensor in source.tensors.items())


@pytest.mark.parametrize("dialect", [ALI, MFZ])
@pytest.mark.parametrize("stages", [Stages(1), Stages(4), Stages(2, 2)], ids=["pp1", "pp4", "pp2-vp2"])
def test_round_trip(dialect: Dialect, stages: Stages, tmp_path: Path) -> None:
    source = written(tmp_path / "root", dialect, stages=stages)
    found = MegatronSource(tmp_path / "root")
    assert found.shape == SHAPE
    assert equal(found, source)


def test_a_tied_head(tmp_path: Path) -> None:
    tied = replace(SHAPE, tie_embeddings=True)
    source = written(tmp_path / "root", MFZ, tied)
    last = load(tmp_path / "root/release/mp_rank_01_001/model_optim_rng.pt")["model"]
    assert torch.equal(last["word_embeddings_for_head"]["weight"][:3], source.tensors["embedding.weight"][8:])
    found = MegatronSource(tmp_path / "root")
    assert (found.shape, equal(found, source)) == (tied, True)
    with pytest.raises(UserError, match="cannot tie the head"):
        written(tmp_path / "ali", ALI, tied)


def test_models_that_began_in_minfanzhaos_fork_may_be_half_split(tmp_path: Path) -> None:
    """--rope-style megatron, the flag's default: the rows of q and k stand as Hugging Face's."""
    written(tmp_path / "root", MFZ)
    change(tmp_path / "root", rope_style="megatron")
    found = MegatronSource(tmp_path / "root")
    stored = load(tmp_path / "root/release/mp_rank_01_000/model_optim_rng.pt")["model"]
    qkv = stored["language_model"]["encoder"]["layers.1.self_attention.query_key_value.weight"]
    for number, part in enumerate("qkv"):  # the second head is this rank's only one
        rows = slice(number * SHAPE.head_dim, (number + 1) * SHAPE.head_dim)
        assert torch.equal(found.read(f"layers.1.attention.{part}.weight")[SHAPE.head_dim :], qkv[rows])


def test_folders_of_alibabas_distributed_checkpointing(tmp_path: Path) -> None:
    source = written(tmp_path / "root", ALI)
    for folder in list((tmp_path / "root/release").iterdir()):
        folder.rename(folder.with_name(f"{folder.name}_dp_000"))
        folder.with_name(f"{folder.name}_dp_001").mkdir()  # its optimizer's part
    assert equal(MegatronSource(tmp_path / "root"), source)


@pytest.mark.parametrize(
    ("dialect", "args", "said"),
    [
        (ALI, {"causal_lm": False}, "causal_lm False"),
        (ALI, {"RMSNorm": False}, "RMSNorm False"),
        (MFZ, {"localsize": 512}, "localsize 512"),
        (MFZ, {"rotary_percent": 0.5}, "rotary_percent 0.5"),
        (MFZ, {"add_bias_linear": True}, "add_bias_linear True"),
    ],
)
def test_other_arithmetic_is_refused(dialect: Dialect, args: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(tmp_path / "root", dialect)
    change(tmp_path / "root", **args)
    with pytest.raises(UserError, match=f"the args of .* say {said}, which llmpipe does not compute"):
        MegatronSource(tmp_path / "root")


@pytest.mark.parametrize("dialect", [ALI, MFZ])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_kv_heads": 1}, "1 KV heads for 2 query heads"),
        ({"qkv_bias": True, "window": 32}, "biases; no window of 32 tokens"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling"),
    ],
)
def test_what_the_forks_cannot_compute_is_not_written(dialect: Dialect, fields: dict[str, Any], said: str) -> None:
    shape = replace(SHAPE, **fields)
    with pytest.raises(UserError, match=f"has no .*{said}"):
        dialect.write_args(shape, Written(1, Stages(), torch.float32, 12, 4))
    with pytest.raises(UserError, match=r"no stages of \(1, 3\) layers"):
        dialect.write_args(SHAPE, Written(1, Stages(2, 1, (1, 3)), torch.float32, 12, 4))


@pytest.mark.parametrize("dialect", [ALI, MFZ])
def test_another_theta_is_carried_and_told(dialect: Dialect, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        args = dialect.write_args(replace(SHAPE, rope_theta=1e6), Written(1, Stages(), torch.float32, 12, 4))
    assert "takes 10000 for rope theta" in caplog.text
    assert dialect.read_args(args)["rope_theta"] == 1e6
    assert dialect.read_args(Namespace(num_layers=1))["rope_theta"] == 1e4  # theirs

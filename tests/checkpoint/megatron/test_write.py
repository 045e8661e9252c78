"""Megatron-LM's directories written: equal to the tests' own by hand, read back, and what cannot be is refused."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_lm_files as made
from llmpipe.checkpoint.megatron.dialects import DIALECTS, named
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.megatron.write import bytes_of, targets, write
from llmpipe.checkpoint.mover import Mover
from llmpipe.checkpoint.source import Slices
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape, named_size
from llmpipe.layout import Stages

SHAPE = Shape(
    family="llama", num_layers=4, hidden=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=20, vocab=131,
    max_positions=64, norm_eps=3e-5, rope_theta=23000.0,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


class Tensors:
    """A source in memory, by Hugging Face's names."""

    path = tokenizer_place = Path("tensors")

    def __init__(self, shape: Shape, tensors: made.Tensors):
        self.shape, self.family = shape, FAMILIES[shape.family]
        self.by_key = {key: tensors[self.family.hf_name(key, shape)] for key in self.family.keys(shape)}

    def keys(self) -> list[str]:
        return list(self.by_key)

    def dtype(self, key: str) -> torch.dtype:
        return self.by_key[key].dtype

    def read(self, key: str, slices: Slices | None = None) -> torch.Tensor:
        return self.by_key[key][slices or ...].clone()

    def blocks(self, key: str) -> None:
        return None


def written(
    root: Path, dialect: str, tp: int, stages: Stages, shape: Shape = SHAPE, dtype: torch.dtype | None = None,
    **model: Any,
) -> tuple[Tensors, made.Tensors]:  # fmt: skip
    """Write a random model; the source, and its Hugging Face tensors."""
    tensors, _ = made.random_model(**model)
    source = Tensors(shape, tensors)
    root.mkdir()
    hashes = write(Mover(source), root, named(dialect), tp, stages, dtype)
    assert set(hashes) == {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return source, tensors


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}/")
        elif value is not None:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("dialect", ["legacy", "mcore"])
@pytest.mark.parametrize(
    ("tp", "stages", "runs"),
    [
        (1, Stages(1), [[range(4)]]),
        (2, Stages(2), [[range(2)], [range(2, 4)]]),
        (2, Stages(3, 1, (1, 2, 1)), [[range(1)], [range(1, 3)], [range(3, 4)]]),
        (1, Stages(2, 2), [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
    ],
    ids=["one", "tp2-pp2", "uneven", "virtual"],
)
def test_equal_to_files_by_hand(dialect: str, tp: int, stages: Stages, runs: list[list[range]], tmp_path: Path) -> None:
    """Every table within a table, every key and every tensor."""
    source, tensors = written(tmp_path / "ours", dialect, tp, stages)
    made.write(tmp_path / "theirs", tensors, made.random_model()[1], dialect, tp, runs)
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.pt"))
    assert files == sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.pt"))
    for file in files:
        ours, theirs = (torch.load(tmp_path / whose / file, weights_only=False) for whose in ("ours", "theirs"))
        models = [name for name in theirs if name.startswith("model")]
        assert models == [name for name in ours if name.startswith("model")]
        for name in models:
            found, wanted = dict(leaves(ours[name])), dict(leaves(theirs[name]))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found = MegatronSource(tmp_path / "ours")
    assert (found.shape, found.dialect.name) == (SHAPE, dialect)
    assert all(torch.equal(found.read(key), source.read(key)) for key in source.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({"tie_embeddings": True}, {"tied": True}),
        ({"family": "qwen2", "qkv_bias": True}, {"qkv_bias": True}),
        ({"family": "qwen3", "qk_norm": True, "head_dim": 12}, {"qk_norm": True, "head_dim": 12}),
        ({"family": "mistral", "window": 16}, {}),
        ({"rope_scaling": LLAMA3}, {}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
        ({"num_heads": 6, "num_kv_heads": 2, "head_dim": 4}, {"heads": 6, "head_dim": 4}),
        ({"num_kv_heads": 4}, {"kv_heads": 4}),
        ({"vocab": 256}, {"vocab": 256}),
        ({"vocab": 3}, {"vocab": 3}),
    ],
    ids=["tied", "qkv bias", "q and k norms", "window", "llama3", "linear", "6/2", "mha", "no padding", "much padding"],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "bf16"])
def test_every_kind_of_model(
    fields: dict[str, Any], model: dict[str, Any], dtype: torch.dtype | None, tmp_path: Path
) -> None:
    source, _ = written(tmp_path / "root", "mcore", 2, Stages(2), replace(SHAPE, **fields), dtype, **model)
    found = MegatronSource(tmp_path / "root")
    assert found.shape == source.shape
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(found.read(key), source.read(key).to(dtype or torch.float32)), key


def test_padding_are_copies_of_the_last_row(tmp_path: Path) -> None:
    """The third and the fourth of four ranks hold nothing else."""
    _, tensors = written(tmp_path / "root", "mcore", 4, Stages(), replace(SHAPE, num_kv_heads=4), kv_heads=4)
    files = sorted((tmp_path / "root").rglob("*.pt"))
    ranks = [torch.load(file, weights_only=False)["model"] for file in files]
    for name, hf in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        rows, whole = tensors[f"{hf}.weight"], torch.cat([rank[f"{name}.weight"] for rank in ranks])
        assert len(whole) == 512 and torch.equal(whole[:131], rows) and (whole[131:] == rows[-1]).all()


def test_the_multiple_of_the_vocabulary() -> None:
    trees = targets(SHAPE, named("legacy"), torch.bfloat16, 2, Stages(), vocab_multiple=1)
    args = trees["iter_0000001/mp_rank_00/model_optim_rng.pt"]["args"]
    assert (args.padded_vocab_size, args.make_vocab_size_divisible_by, args.vocab_size) == (132, 1, 131)


def test_70b_from_its_shape_alone() -> None:
    trees = targets(named_size("llama2_70b"), named("mcore"), torch.bfloat16, 8, Stages(4))
    assert len(trees) == 32
    norms = 2 * 80 * 8192 + 8192  # on each rank
    padding = 2 * (32768 - 32000) * 8192
    assert bytes_of(trees) == 2 * (FAMILIES["llama"].num_parameters(named_size("llama2_70b")) + 7 * norms + padding)


@pytest.mark.parametrize(
    ("dialect", "fields", "tp", "stages", "message"),
    [
        ("mcore", {}, 3, Stages(), r"tp has to be one of \[1, 2\]"),
        ("mcore", {}, 4, Stages(), r"tp has to be one of \[1, 2\]"),
        ("mcore", {}, 1, Stages(3), "pp 3 does not divide 4 layers"),
        ("mcore", {}, 1, Stages(4, 1, (1, 2, 1, 0)), "numbers from 1 on"),
        ("mcore", {"num_layers": 7}, 1, Stages(4, 1, (1, 2, 3, 1)), "pp-layers 1,2,3,1: Megatron-LM's stages"),
        ("mcore", {"mlp_bias": True}, 1, Stages(), "biases on all linear layers"),
        ("mcore", {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, 1, Stages(), "cannot say the rope scaling"),
        ("mcore", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 1, Stages(), "cannot say the rope scaling"),
        ("mcore", {"family": "falcon"}, 1, Stages(), "has no falcon models, but llama, mistral"),
        ("legacy", {"family": "qwen3", "qk_norm": True}, 1, Stages(), "has no qwen3 models"),
        ("legacy", {"family": "mistral", "window": 4}, 1, Stages(), "no window"),
        ("legacy", {"rope_scaling": LLAMA3}, 1, Stages(), "no rope scaling but linear"),
    ],
)  # fmt: skip
def test_refused(dialect: str, fields: dict[str, Any], tp: int, stages: Stages, message: str) -> None:
    with pytest.raises(UserError, match=message):
        targets(replace(SHAPE, **fields), named(dialect), torch.float32, tp, stages)


def test_a_type_that_megatron_has_not() -> None:
    with pytest.raises(UserError, match=r"fp32, fp16 or bf16, not torch\.float64"):
        targets(SHAPE, named("mcore"), torch.float64, 1, Stages())


def test_a_window_that_begins_later_is_refused() -> None:
    shape = replace(SHAPE, family="qwen2", window=4, window_from=2)
    with pytest.raises(UserError, match="no window from layer 2"):
        targets(shape, named("mcore"), torch.float32, 1, Stages())


def test_the_legacy_models_theta(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        targets(SHAPE, named("legacy"), torch.float32, 1, Stages())
    assert "takes 10000 for rope theta, whatever its args say" in caplog.text


def test_a_source_of_two_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, _ = made.random_model(dtype=torch.bfloat16)
    source = Tensors(SHAPE, tensors)
    source.by_key["layers.2.mlp_norm.weight"] = norm = torch.rand(32)
    (tmp_path / "root").mkdir()
    write(Mover(source), tmp_path / "root", named("mcore"), 1, Stages())
    assert "1 tensors are cast to the embedding's, torch.bfloat16, among them layers.2.mlp_norm.weight" in caplog.text
    assert torch.equal(MegatronSource(tmp_path / "root").read("layers.2.mlp_norm.weight"), norm.bfloat16())


def test_dialects_are_named_as_the_option_names_them() -> None:
    assert all(name == dialect.name for name, dialect in DIALECTS.items()) and {"mcore", "legacy"} <= DIALECTS.keys()


def test_the_source_decides_where_the_layout_is_open(tmp_path: Path) -> None:
    """From rank files to rank files of another layout, without a directory in between."""
    source, _ = written(tmp_path / "one", "mcore", 2, Stages(2))
    again = MegatronSource(tmp_path / "one")
    (tmp_path / "two").mkdir()
    write(Mover(again), tmp_path / "two", named("legacy"), 1, Stages(4))
    found = MegatronSource(tmp_path / "two")
    assert found.shape == SHAPE
    assert all(torch.equal(found.read(key), source.read(key)) for key in source.keys())  # noqa: SIM118

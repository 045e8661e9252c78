"""Formats told apart; what does not fit a model is listed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmpipe.checkpoint import formats
from llmpipe.checkpoint.formats import Told, open_source
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.meta import MetaSource
from llmpipe.checkpoint.source import check_tensors, overlap
from llmpipe.errors import UserError
from llmpipe.families import from_hf_config, named_size, to_hf_config

MAY = f"there may stand {formats.MAY}"


def test_formats_are_told_from_the_files(hf: Path, meta: Path) -> None:
    assert isinstance(open_source(hf), HfSource)
    assert isinstance(open_source(meta), MetaSource)


def test_what_is_no_source_is_named_with_what_may_stand_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'no'} is missing: {MAY}")):
        open_source(tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'file'} is a file: {MAY}")):
        open_source(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"holds no weights that llmpipe reads: nothing found; {MAY}")):
        open_source(tmp_path / "empty")
    for name in ("config.json", "model.ckpt"):
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match=re.escape(f": config.json, model.ckpt found; {MAY}")):
        open_source(tmp_path / "empty")


def test_expected_shape_is_checked_field_by_field(hf: Path) -> None:
    found = open_source(hf).shape
    assert open_source(hf, Told(found)).shape == found
    with pytest.raises(UserError) as error:
        open_source(hf, Told(replace(found, num_layers=5, rope_theta=1e4)))
    assert str(error.value) == (
        f"{hf} is not of the shape that was asked for: num_layers is 4, expected 5; rope_theta is 500000.0, expected"
        " 10000.0: name the right shape or leave it out"
    )
    with pytest.raises(UserError, match="hidden is 32, expected 4096; num_heads is 8, expected 32;"):
        open_source(hf, Told(named_size("llama2_7b")))


def test_every_misfit_is_listed() -> None:
    with pytest.raises(UserError) as error:
        check_tensors(Path("dir"), {"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (1,)})
    assert str(error.value) == (
        "dir: 3 tensors do not fit the model:\n  missing: a\n  left over: d\n"
        "  wrong shape: b is [3, 2], expected [2, 3]"
    )
    with pytest.raises(UserError, match=r"\n  missing: t19\n  and 5 more$"):
        check_tensors(Path("dir"), {f"t{i}": (1,) for i in range(25)}, {})


def test_overlap_is_given_within_both() -> None:
    region, wanted = (slice(4, 8), slice(0, 3)), (slice(6, 12), slice(1, 2))
    assert overlap(region, wanted) == ((slice(2, 4), slice(1, 2)), (slice(0, 2), slice(0, 1)))
    assert overlap(region, (slice(8, 9), slice(0, 3))) is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "is no table of keys: copy or download it again"),
        ('{"dim": "64", "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}', "copy or download it again"),
        ('{"dim": 64, "n_layers": 2, "n_heads": 0, "norm_eps": 1e-5}', "copy or download it again"),
        (
            '{"dim": 64, "n_layers": -2, "n_heads": 4, "norm_eps": 1e-5}',
            "num_layers is -2, but has to be a whole number from 1 on",
        ),
        (
            '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": -1e-5}',
            "norm_eps is -1e-05, but has to be a number above 0",
        ),
        (
            '{"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "rope_theta": "far"}',
            "could not convert string to float: 'far'",
        ),
    ],
)
def test_params_of_the_wrong_kind_are_told(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "params.json").write_text(content)
    tensors = {"tok_embeddings.weight": torch.zeros(8, 64), "layers.0.feed_forward.w1.weight": torch.zeros(96, 64)}
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=f"{re.escape(str(tmp_path / 'params.json'))}.*{re.escape(told)}"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_attention_heads": 0}, "integer division or modulo by zero: copy or download it again"),
        ({"hidden_size": "64"}, "copy or download it again"),
        ({"num_hidden_layers": 1.5}, "num_layers is 1.5, but has to be a whole number from 1 on"),
        ({"rope_theta": "far"}, "rope_theta is 'far', but has to be a number above 0"),
        ({"rms_norm_eps": 0}, "norm_eps is 0, but has to be a number above 0"),
    ],
)
def test_config_of_the_wrong_kind_is_told(change: dict[str, object], told: str) -> None:
    config = to_hf_config(named_size("llama2_7b"), "float32", 1, 2) | change
    with pytest.raises(UserError, match=f"config.json: .*{re.escape(told)}"):
        from_hf_config(config)


def test_a_config_that_is_no_table_is_told() -> None:
    with pytest.raises(UserError, match=r"config\.json is no table of keys: copy or download it again"):
        from_hf_config([])  # type: ignore[arg-type]

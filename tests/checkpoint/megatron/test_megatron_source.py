"""Megatron-LM's directories read: what the args say, what they leave open, what is not there; files by the tests."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import megatron_lm_files as made
from llmpipe.checkpoint import hf
from llmpipe.checkpoint.hf import HfSource
from llmpipe.checkpoint.megatron.source import MegatronSource
from llmpipe.checkpoint.mover import Mover
from llmpipe.errors import UserError
from llmpipe.families import FAMILIES, Shape

EVEN = [[range(2)], [range(2, 4)]]
SHAPE = Shape(
    family="llama", num_layers=4, hidden=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn=20, vocab=131,
    max_positions=64, norm_eps=3e-5, rope_theta=23000.0,
)  # fmt: skip


def directory(
    root: Path, kind: str = "mcore", tp: int = 2, stages: list[list[range]] = EVEN, args: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[Path, made.Tensors]:  # fmt: skip
    """A directory and the Hugging Face tensors that it holds."""
    tensors, config = made.random_model(**model)
    return made.write(root / "root", tensors, config, kind, tp, stages, **(args or {})), tensors


def assert_holds(source: MegatronSource, tensors: made.Tensors) -> None:
    family = FAMILIES[source.shape.family]
    assert {family.hf_name(key, source.shape) for key in source.keys()} == tensors.keys()  # noqa: SIM118
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(source.read(key), tensors[family.hf_name(key, source.shape)]), key


def change(root: Path, edit: Callable[[dict[str, Any]], Any], file: str = "*") -> None:
    """Change every file, or those of a rank's folder."""
    for path in root.glob(f"iter_*/{file}/*.pt"):
        table = torch.load(path, weights_only=False)
        edit(table)
        torch.save(table, path)


@pytest.mark.parametrize("kind", ["legacy", "mcore", "local"])
@pytest.mark.parametrize(
    ("tp", "stages"),
    [
        (1, [[range(4)]]),
        (2, EVEN),
        (1, [[range(1)], [range(1, 4)]]),
        (2, [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
    ],
    ids=["one", "tp2-pp2", "uneven", "virtual"],
)
def test_any_layout(kind: str, tp: int, stages: list[list[range]], tmp_path: Path) -> None:
    root, tensors = directory(tmp_path, kind, tp, stages)
    found = MegatronSource(root)
    assert (found.shape, found.dialect.name) == (SHAPE, "legacy" if kind == "legacy" else "mcore")
    assert_holds(found, tensors)
    assert_holds(MegatronSource(root / "iter_0000001"), tensors)


@pytest.mark.parametrize(
    ("model", "args", "fields"),
    [
        ({"tied": True}, {"untie_embeddings_and_output_weights": False}, {"tie_embeddings": True}),
        ({"qkv_bias": True}, {"add_qkv_bias": True}, {"family": "qwen2", "qkv_bias": True}),
        ({"qk_norm": True}, {"qk_layernorm": True}, {"family": "qwen3", "qk_norm": True}),
        ({"head_dim": 12}, {}, {"head_dim": 12}),
        ({}, {"window_size": (15, 0)}, {"family": "mistral", "window": 16}),
        ({}, {"window_size": (-1, 0)}, {}),
        ({}, {"rotary_seq_len_interpolation_factor": 4}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        (
            {},
            {"use_rope_scaling": True},
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}},
        ),
        ({"kv_heads": 4}, {"group_query_attention": False, "num_query_groups": 1}, {"num_kv_heads": 4}),
    ],
    ids=["tied", "qkv bias", "q and k norms", "wide heads", "window", "no window", "linear", "llama3", "no groups"],
)  # fmt: skip
def test_what_the_args_say(model: dict[str, Any], args: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    root, tensors = directory(tmp_path, args=args, **model)
    found = MegatronSource(root)
    assert found.shape == replace(SHAPE, **fields)
    assert_holds(found, tensors)


def test_names_of_before_2023(tmp_path: Path) -> None:
    root, tensors = directory(tmp_path, "legacy")

    def rename(table: dict[str, Any]) -> None:
        model = table["model"]["language_model"]
        pairs = [("_norm.", "_layernorm."), (".self_attention.", ".attention.")]
        old = {name.replace(*pairs[0]).replace(*pairs[1]): tensor for name, tensor in model.pop("encoder").items()}
        model["transformer"] = old
        table["args"] = type(table["args"])(**{"use_rotary_position_embeddings": True} | vars(table["args"]))
        del table["args"].position_embedding_type

    change(root, rename)
    assert_holds(MegatronSource(root), tensors)


def test_rows_in_interleaved_order(tmp_path: Path) -> None:
    tensors, config = made.random_model()
    turned = {
        name: t.view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32) if ".q_proj" in name or ".k_proj" in name else t
        for name, t in tensors.items()
    }
    root = made.write(tmp_path / "root", turned, config, "mcore", 2, EVEN, rotary_interleaved=True)
    assert_holds(MegatronSource(root), tensors)


def test_norms_less_one(tmp_path: Path) -> None:
    """gamma + 1 in fp32: in 16 bits it would lose gamma's low bits."""
    tensors, config = made.random_model(dtype=torch.bfloat16)
    root = made.write(tmp_path / "root", tensors, config, "mcore", 2, EVEN, apply_layernorm_1p=True)
    source = MegatronSource(root)
    key = "layers.3.mlp_norm.weight"
    wanted = tensors["model.layers.3.post_attention_layernorm.weight"].float() + 1
    assert torch.equal(source.read(key), wanted) and source.dtype(key) == torch.float32 and source.blocks(key) is None
    assert torch.equal(source.read(key, (slice(3, 7),)), wanted[3:7])
    assert source.blocks("layers.3.mlp.gate.weight") and source.dtype("layers.3.mlp.gate.weight") == torch.bfloat16
    (tmp_path / "hf").mkdir()
    hf.write(Mover(source), tmp_path / "hf")
    assert torch.equal(HfSource(tmp_path / "hf").read(key), wanted)


def test_states_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, _ = directory(tmp_path)
    with caplog.at_level(logging.INFO):
        MegatronSource(root)
    assert "left alone, weights only are read: optimizer" in caplog.text
    assert "125 of the vocabulary's 256 rows are padding, says the args" in caplog.text
    assert "(--source-dialect mcore)" in caplog.text


def vocabularies(tmp_path: Path, said: int | None) -> Path:
    return directory(tmp_path, args={"vocab_size": said})[0]


def test_a_vocabulary_that_nobody_says(tmp_path: Path) -> None:
    root = vocabularies(tmp_path, None)
    with pytest.raises(UserError, match=r"the embedding has 256 rows.*say it with --vocab N"):
        MegatronSource(root)
    assert MegatronSource(root, vocab=131).shape == SHAPE
    assert MegatronSource(root, SHAPE).shape == SHAPE
    with pytest.raises(UserError, match="256 rows, but --vocab says 257"):
        MegatronSource(root, vocab=257)


def test_a_vocabulary_that_a_tokenizer_says(tmp_path: Path) -> None:
    root = vocabularies(tmp_path, None)
    words = {"model": {"vocab": {f"w{i}": i for i in range(130)}}, "added_tokens": [{"id": 130}, {"id": 2}]}
    (root / "tokenizer.json").write_text(json.dumps(words))
    assert MegatronSource(root).shape.vocab == 131
    (root / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is no tokenizer"):
        MegatronSource(root)
    assert MegatronSource(root, vocab=131).shape.vocab == 131


def test_the_padded_vocabulary_in_the_args(tmp_path: Path) -> None:
    """Some tools write it; a named shape knows better, and --vocab best."""
    root = vocabularies(tmp_path, 256)
    assert MegatronSource(root).shape.vocab == 256
    assert MegatronSource(root, SHAPE).shape.vocab == 131
    assert MegatronSource(root, SHAPE, vocab=140).shape.vocab == 140


def test_a_vocabulary_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab is 131, expected 120"):
        MegatronSource(vocabularies(tmp_path, 131), replace(SHAPE, vocab=120))


def test_theta_at_its_default_may_not_have_been_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, _ = directory(tmp_path, args={"rotary_base": 10000})
    assert MegatronSource(root).shape.rope_theta == 1e4
    assert "rope_theta 10000.0, rope_scaling None; or give --shape" in caplog.text
    assert MegatronSource(root, SHAPE).shape == SHAPE
    assert "{'rope_theta': 23000.0} taken, as asked for" in caplog.text


def test_a_theta_that_was_told_is_checked(tmp_path: Path) -> None:
    root, _ = directory(tmp_path, args={"rotary_base": 5000})
    with pytest.raises(UserError, match=r"rope_theta is 5000\.0, expected 23000\.0"):
        MegatronSource(root, SHAPE)


def test_a_window_that_the_args_do_not_know_comes_from_the_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of 2024 have no window_size; docs/proof has what its own loader makes of a Mistral."""
    root, tensors = directory(tmp_path)
    assert MegatronSource(root).shape == SHAPE
    assert "does not say window: none taken; with --shape, what that says" in caplog.text
    windowed = replace(SHAPE, family="mistral", window=16)
    found = MegatronSource(root, windowed)
    assert found.shape == windowed
    assert_holds(found, tensors)
    said, _ = directory(tmp_path / "said", args={"window_size": None})
    with pytest.raises(UserError, match="window is None, expected 16"):
        MegatronSource(said, windowed)


def test_what_args_leave_open_comes_from_the_shape(tmp_path: Path) -> None:
    root, tensors = directory(tmp_path)
    change(
        root, lambda table: [delattr(table["args"], name) for name in ("rotary_base", "norm_epsilon", "kv_channels")]
    )
    with pytest.raises(
        UserError, match="does not say head_dim, norm_eps, rope_theta: name the model's shape with --shape"
    ):
        MegatronSource(root)
    assert_holds(MegatronSource(root, SHAPE), tensors)
    change(root, lambda table: table.update(args=None))
    with pytest.raises(UserError, match="--vocab N"):
        MegatronSource(root)
    assert MegatronSource(root, SHAPE).shape == SHAPE


@pytest.mark.parametrize(
    "args", [{"num_experts": 8}, {"normalization": "LayerNorm"}, {"swiglu": False}, {"rotary_percent": 0.5},
             {"position_embedding_type": "learned_absolute"}, {"multi_latent_attention": True}, {"causal_lm": False}],
    ids=lambda args: next(iter(args)),
)  # fmt: skip
def test_other_arithmetic_is_refused(args: dict[str, Any], tmp_path: Path) -> None:
    root, _ = directory(tmp_path, args=args)
    with pytest.raises(UserError, match=f"args.* {'without --causal-lm' if 'causal_lm' in args else next(iter(args))}"):
        MegatronSource(root)


def test_the_dialect_can_be_named(tmp_path: Path) -> None:
    root, tensors = directory(tmp_path)
    assert_holds(MegatronSource(root, dialect="mcore"), tensors)
    with pytest.raises(UserError, match=r"dialect .legcy.: did you mean 'legacy'"):
        MegatronSource(root, dialect="legcy")
    with pytest.raises(UserError, match="missing on the first rank"):
        MegatronSource(root, dialect="legacy")


def test_tensors_of_no_megatron(tmp_path: Path) -> None:
    root, _ = directory(tmp_path)
    change(root, lambda table: table.update(model={"weight": torch.ones(3)}))
    with pytest.raises(UserError, match=r"no known Megatron \(weight\): say which with --source-dialect"):
        MegatronSource(root)


def first(table: dict[str, Any], name: str) -> torch.Tensor:
    return table["model"][name]


QKV, NORM = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
RANK = "mp_rank_01_001"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / f"iter_0000001/{RANK}"), "not of tp 1, pp 1"),
        (lambda root: (root / f"iter_0000001/{RANK}/model_optim_rng.pt").unlink(), "not of tp 1, pp 1"),
        (lambda root: shutil.rmtree(root / "iter_0000001"), "iter_0000001 is no folder"),
        (lambda root: (root / "latest_checkpointed_iteration.txt").unlink(), "none of iter_0000001 is the one"),
        (lambda root: (root / "latest_checkpointed_iteration.txt").write_text("x"), "says 'x'"),
        (
            lambda root: shutil.copytree(root / "iter_0000001/mp_rank_00_000", root / "iter_0000001/mp_rank_00"),
            "twice|with and without a pipeline",
        ),
        (
            lambda root: shutil.copy(
                root / f"iter_0000001/{RANK}/model_optim_rng.pt", root / f"iter_0000001/{RANK}/model_rng.pt"
            ),
            "tp 1, pp 1 twice",
        ),
        (
            lambda root: shutil.copytree(root / f"iter_0000001/{RANK}", root / f"iter_0000001/{RANK}_001"),
            "expert-parallel",
        ),
        (
            lambda root: [shutil.rmtree(root / f"iter_0000001/mp_rank_0{tp}_001") for tp in (0, 1)],
            r"of tp 2 x pp 2 ranks, but 2 x 1 are beside it",
        ),
        (lambda root: change(root, lambda table: table["model"].pop(QKV), RANK), f"missing: {QKV}"),
        (lambda root: change(root, lambda table: table["model"].update(more=torch.ones(2)), RANK), "left over: more"),
        (
            lambda root: change(root, lambda table: table["model"].update({QKV: torch.ones(4, 4)}), RANK),
            "wrong shape.*is \\[4, 4\\], expected \\[32, 32\\]",
        ),
        (lambda root: change(root, lambda table: first(table, NORM).add_(1), RANK), f"{NORM} is not what"),
        (
            lambda root: change(root, lambda table: table["model"].update({QKV: first(table, QKV).half()}), RANK),
            "is torch.float16, elsewhere torch.float32",
        ),
        (lambda root: change(root, lambda table: table.update(checkpoint_version=1.0)), "another order"),
        (lambda root: change(root, lambda table: table.pop("model")), "holds no `model`"),
        (lambda root: change(root, lambda table: table.update(model1=table.pop("model"))), "model0 is missing"),
        (
            lambda root: change(root, lambda table: table["model"].clear(), "mp_rank_0?_001"),
            "stage 1 holds no layers",
        ),
    ],
)  # fmt: skip
def test_damage_is_named(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    root, _ = directory(tmp_path)
    damage(root)
    with pytest.raises(UserError, match=message):
        MegatronSource(root)


@pytest.mark.parametrize(("one", "other"), [("00_000", "01_000"), ("00_000", "00_001"), ("01_000", "00_001")])
def test_ranks_swapped(one: str, other: str, tmp_path: Path) -> None:
    """Their tensors' shapes are alike, but each file's args say which process wrote it."""
    root, _ = directory(tmp_path, tied=True, args={"untie_embeddings_and_output_weights": False})
    here, there = (root / f"iter_0000001/mp_rank_{rank}" for rank in (one, other))
    here.rename(root / "aside")
    there.rename(here)
    (root / "aside").rename(there)
    with pytest.raises(UserError, match="files are swapped"):
        MegatronSource(root)


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    root, _ = directory(tmp_path, tied=True, args={"untie_embeddings_and_output_weights": False})
    change(root, lambda table: table["model"]["output_layer.weight"].add_(1), RANK)
    with pytest.raises(UserError, match=r"output_layer\.weight is not what"):
        MegatronSource(root)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_dist_without_args(tmp_path: Path) -> None:
    tensors, _ = made.random_model()
    folder = tmp_path / "iter_0000001"
    dcp.save(made.stacked(tensors, 2, 4), checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text("{}")
    assert_holds(MegatronSource(folder, SHAPE), tensors)
    with pytest.raises(UserError, match="--vocab N"):
        MegatronSource(folder)

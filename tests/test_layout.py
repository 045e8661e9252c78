"""Ranks, slices and what cannot be split."""

import pytest
import torch

from llmpipe.errors import UserError
from llmpipe.layout import Coordinates, Layout, Stages, check_split, chunk, kv_chunk, legal_tps


def test_ranks_are_numbered_as_in_megatron() -> None:
    # The groups that Megatron-LM's initialize_model_parallel documents for 16 GPUs, tp 2 and pp 4.
    layout = Layout(gpus_per_node=8, nodes=2, tp=2, pp=4).resolved()
    where = [layout.coordinates(rank) for rank in range(16)]
    assert layout.dp == 2
    assert [where[0], where[1]] == [Coordinates(dp=0, cp=0, pp=0, tp=0), Coordinates(dp=0, cp=0, pp=0, tp=1)]
    assert [rank for rank in range(16) if (where[rank].dp, where[rank].tp) == (0, 0)] == [0, 4, 8, 12]
    assert [rank for rank in range(16) if (where[rank].pp, where[rank].tp) == (0, 0)] == [0, 2]
    assert len(set(where)) == 16


def test_context_ranks_stand_between_tensor_and_data_ranks() -> None:
    # As in megatron-core's default order, tp-cp-ep-dp-pp.
    layout = Layout(gpus_per_node=8, tp=2, cp=2).resolved()
    where = [layout.coordinates(rank) for rank in range(8)]
    assert [(at.tp, at.cp, at.dp) for at in where] == [
        (0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)
    ]  # fmt: skip


def test_dp_takes_what_is_left_over() -> None:
    assert Layout(gpus_per_node=8, tp=2).resolved().dp == 4
    assert Layout(gpus_per_node=8, tp=2, dp=4).resolved().dp == 4


@pytest.mark.parametrize("given", [{"tp": 3}, {"tp": 2, "dp": 8}, {"pp": 16}])
def test_wrong_world_size(given: dict[str, int]) -> None:
    with pytest.raises(UserError) as error:
        Layout(gpus_per_node=4, nodes=2, **given).resolved()
    assert "does not make 8 processes (2 nodes x 4 gpus_per_node)" in str(error.value)
    assert "tp x pp x cp has to be one of [1, 2, 4, 8]" in str(error.value)


def test_zero_is_refused() -> None:
    with pytest.raises(UserError, match="layout: tp is 0, but has to be 1 or more"):
        Layout(tp=0)


def test_schedules_that_virtual_stages_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"gpipe has no virtual stages, and vp is 2: vp 1, .* would work"):
        Layout(pp=2, vp=2, pp_schedule="gpipe").check_training()
    with pytest.raises(UserError, match="interleaved is for virtual stages: 1f1b, or vp 2, would work"):
        Layout(pp=2, pp_schedule="interleaved").check_training()


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble"])
def test_a_schedule_of_stages_is_refused_where_there_are_none(schedule: str) -> None:
    with pytest.raises(
        UserError, match=f"pp_schedule {schedule} is an order of pipeline stages, and pp is 1: leave it"
    ):
        Layout(pp_schedule=schedule).check_training()


def test_legal_tps_replicate_kv_heads() -> None:
    assert legal_tps(64, 8) == [1, 2, 4, 8, 16, 32, 64]  # above 8, ranks share a KV head
    assert legal_tps(40, 40) == [1, 2, 4, 5, 8, 10, 20, 40]
    assert legal_tps(71, 1) == [1, 71]  # Falcon 7B


def test_tp_that_does_not_divide_names_those_that_would() -> None:
    with pytest.raises(UserError, match=r"tp 3 does not divide 4 query heads and 2 KV heads: .* one of \[1, 2, 4\]"):
        check_split(3, num_heads=4, num_kv_heads=2, ffn=352)
    with pytest.raises(UserError, match=r"tp 4 does not divide the MLP's 350 rows: tp has to be one of \[1, 2\]"):
        check_split(4, num_heads=4, num_kv_heads=2, ffn=350)
    with pytest.raises(UserError, match=r"pp 3 does not divide 4 layers: pp has to be one of \[1, 2, 4\]"):
        Stages(3).check(4)


def test_stages_cover_the_layers_once() -> None:
    assert [layer for rank in range(4) for layer in Stages(4).layers_of(80, rank)] == list(range(80))
    assert [Stages(2, layers=(15, 17)).layers_of(32, rank) for rank in range(2)] == [
        list(range(15)),
        list(range(15, 32)),
    ]


def test_virtual_stages_are_dealt_round() -> None:
    # Narayanan et al. 2021 (arXiv:2104.04473), figure 4: 2 ranks with 2 chunks each of 8 layers.
    assert [Stages(2, 2).layers_of(8, rank) for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert Stages(2, 2, (1, 2, 3, 2)).runs(8, 1) == [range(1, 3), range(6, 8)]
    assert Stages(2, 2, (1, 2, 3, 2)).name == "pp2-vp2-layers1.2.3.2"


def test_stages_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"pp-layers 15,18: 2 numbers from 1 on are expected.* that make 32 layers"):
        Stages(2, layers=(15, 18)).check(32)
    with pytest.raises(UserError, match="pp has to be 2 or more"):
        Stages(1, 2).check(4)
    with pytest.raises(UserError, match=r"pp 3 x vp 2 does not divide 8 layers: pp has to be one of \[2, 4\]"):
        Stages(3, 2).check(8)
    with pytest.raises(UserError, match=r"pp 2 x vp 2 does not divide 2 layers: take a smaller vp, or --pp-layers"):
        Stages(2, 2).check(2)


@pytest.mark.parametrize(("size", "parts"), [(32000, 8), (203, 4), (5, 4), (3, 8)])
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    theirs = [part.tolist() for part in torch.arange(size).chunk(parts)]
    ours = [list(range(size))[chunk(size, parts, rank)] for rank in range(parts)]
    assert ours == theirs + [[]] * (parts - len(theirs))


def test_ranks_that_share_a_kv_head_hold_the_same_rows() -> None:
    rows = [kv_chunk(num_kv_heads=2, head_dim=16, tp=8, rank=rank) for rank in range(8)]
    assert rows == [slice(0, 16)] * 4 + [slice(16, 32)] * 4

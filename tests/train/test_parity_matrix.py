"""Every layout trains as one process does; the matrix and what it compares: parity.py."""

from pathlib import Path

import pytest
from jobs import ZERO_BUBBLE, losses
from parity import ALONE, LAYOUTS, TIED, Cell, Matrix, in_turn

from llmpipe.errors import UserError
from llmpipe.train.preflight import preflight


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=[ZERO_BUBBLE] * cell.is_zero_bubble) for cell in in_turn()]
)
def test_every_layout_trains_as_one_process(cell: Cell, matrix: Matrix, tmp_path: Path) -> None:
    difference = matrix.difference(cell, tmp_path / "run")
    assert difference.is_small, difference


@pytest.mark.parametrize("alone", ALONE)
@pytest.mark.parametrize("family", ["Llama", "Falcon"])
def test_one_process_learns(alone: str, family: str, matrix: Matrix) -> None:
    """What all others are compared with is no training that stands still; transformers judges it elsewhere."""
    _, lines = matrix.alone(Cell(alone, family, packing=True, micro_batches=4))
    loss = losses(lines)
    assert len(loss) == 20 and loss[-1] < 0.9 * loss[0]


PIPELINES = {layout: given for layout, given in (LAYOUTS | TIED).items() if given.get("pp", 1) > 1}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[ZERO_BUBBLE] * (given.get("pp_schedule") == "zero-bubble"))
        for layout, given in PIPELINES.items()
    ],
)
def test_fewer_micro_batches_than_stages_are_refused(layout: str, matrix: Matrix, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 micro-batches of \d+, fewer than its [24] stages: .* would work"):
        preflight(matrix.job(Cell(layout, "Llama", packing=True, micro_batches=1), tmp_path))

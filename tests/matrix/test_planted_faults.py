"""Faults planted in correct conversions are found, one by one; benchmarks/planted_faults.py makes a page of it."""

import logging
import shutil
from pathlib import Path

import pytest
from planted import NOT_KNOWN, ROUTES, ask, faults_of, lay, plant

EVERY = 6
"""Of a checkpoint's many faults, each route takes every sixth, beginning with another than the route before.
The benchmark plants all."""


def chosen_faults(number: int) -> list[str]:
    route = ROUTES[number]
    names = list(faults_of(route))
    return names if len(names) < 30 else names[number % EVERY :: EVERY]


@pytest.mark.parametrize("number", range(len(ROUTES)), ids=[route.name for route in ROUTES])
def test_a_correct_conversion_passes_and_no_fault_does(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="llmpipe")
    laid = lay(ROUTES[number], tmp_path)
    (tmp_path / "right").mkdir()
    right = ask(laid.route.name, "", laid.subject, laid.reference, tmp_path / "right")
    assert not right.caught, right.first
    planted = []
    for name in chosen_faults(number):
        (tmp_path / "wrong").mkdir()
        if found := plant(laid, name, tmp_path / "wrong"):
            planted.append(found)
        shutil.rmtree(tmp_path / "wrong")
    assert len(planted) >= 4
    missed = {found.fault for found in planted if not found.caught}
    assert missed == {found.fault for found in planted if (found.route, found.fault) in NOT_KNOWN}, missed
    assert all(found.first not in ("", "None") for found in planted if found.caught)


def test_more_than_twenty_kinds_are_planted() -> None:
    assert len({name for number in range(len(ROUTES)) for name in chosen_faults(number)}) >= 80

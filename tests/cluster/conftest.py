"""The cluster, a project that was trained in it undisturbed, a fresh project for each drill; and a browser."""

import os
from collections.abc import Iterator

import pytest
from browser import Browser
from drill_project import TARGET, DrillProject, make_project
from private_slurm import PrivateSlurm, private_slurm


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, without a window."""
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateSlurm]:
    """Four nodes."""
    if "LLMPIPE_CLUSTER" not in os.environ:
        pytest.skip("these start a Slurm of their own, and take minutes: make test-cluster")
    with private_slurm() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def undisturbed(slurm: PrivateSlurm) -> DrillProject:
    """From corpus and weights to the trained run, each stage a job."""
    folder = slurm.folder / "projects/undisturbed"
    make_project(folder)
    project = DrillProject(folder, slurm)
    project.start(TARGET)
    project.finish()
    return project


@pytest.fixture
def project(undisturbed: DrillProject, request: pytest.FixtureRequest) -> Iterator[DrillProject]:
    """One whose run is not trained, in a cluster with all its nodes; afterwards none of its jobs is left."""
    undisturbed.slurm.up()
    project = undisturbed.copy(request.node.name)
    yield project
    project.kill_snakemake()
    undisturbed.slurm.cancel_jobs()

"""The cluster, a project that was trained in it undisturbed, and a fresh project for each drill."""

import os
from collections.abc import Iterator

import pytest
from drill_project import TARGET, DrillProject, make_project
from private_slurm import PrivateSlurm, private_slurm


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

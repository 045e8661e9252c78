"""What is installed: Python, the packages that llmpipe needs, its compiled helpers."""

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from llmpipe.doctor.finding import Finding, mend, note, ok

OLDEST_PYTHON = (3, 11)


def python() -> Iterator[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()}, {sys.executable}"
    if sys.version_info >= OLDEST_PYTHON:
        yield ok("Python", found)
    else:
        yield mend("Python", found, f"llmpipe needs {'.'.join(map(str, OLDEST_PYTHON))} or later: install a later one")


def packages() -> Iterator[Finding]:
    """What pyproject.toml asks for."""
    try:
        needed = [Requirement(text) for text in requires("llmpipe") or []]
    except PackageNotFoundError:
        yield mend("packages", "llmpipe itself is not installed", "pip install -e . in its folder")
        return
    needed = [requirement for requirement in needed if not (requirement.marker and "extra" in str(requirement.marker))]
    wrong = [problem for requirement in needed if (problem := _problem(requirement))]
    if wrong:
        advice = "pip install " + " ".join(f"'{requirement}'" for requirement, _ in wrong)
        yield mend("packages", ", ".join(found for _, found in wrong), advice)
    else:
        yield ok("packages", f"llmpipe {version('llmpipe')} and the {len(needed)} that it needs")


def _problem(requirement: Requirement) -> tuple[Requirement, str] | None:
    """A requirement that is not met, and how."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return requirement, f"{requirement.name} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return requirement, f"{requirement.name} is {found}, expected {requirement.specifier}"


def helpers() -> Iterator[Finding]:
    """The compiled helpers: built for this Python, and loadable."""
    try:
        module = importlib.import_module("llmpipe.helpers")
    except ImportError as error:
        advice = "build them: pip install -e . in llmpipe's folder; it needs a C++ compiler and Python's headers"
        yield mend("helpers", f"not loadable: {error}", advice)
    else:
        yield ok("helpers", f"compiled, {module.__file__}")


def apex(facts: dict[str, str | None] | None) -> Iterator[Finding]:
    """NVIDIA apex, which is optional: `facts` has for each kind of its kernels None, or what is wrong."""
    if facts is None:
        yield ok("apex", "not installed; it is optional, torch's own kernels do the work")
        return
    wrong = sorted({problem for problem in facts.values() if problem})
    if not wrong:
        yield ok("apex", f"NVIDIA's, with {' and '.join(facts)}")
        return
    for problem in wrong:
        yield note("apex", problem)

"""The build of the compiled helpers says what to install where something is missing."""

import shutil
import subprocess
from pathlib import Path

import cmake

ROOT = Path(__file__).parents[2]


def configure(build: Path, path: str, *options: str) -> str:
    """What CMake says when it is refused by CMakeLists.txt."""
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    make = f"-DCMAKE_MAKE_PROGRAM={shutil.which('make')}"
    arguments = [program, "-S", ROOT, "-B", build, "-G", "Unix Makefiles", make, *options]
    done = subprocess.run(arguments, env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    message = configure(tmp_path / "build", str(tmp_path / "bin"))
    assert (
        "llmpipe compiles its helpers and found no C++ compiler. Install one and run pip again: apt-get install g++"
        in message
    )


def test_no_python_headers(tmp_path: Path) -> None:
    message = configure(tmp_path / "build", "/usr/bin:/bin", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON")
    assert "found no headers of it (Python.h). Install them: apt-get install python3-dev" in message

"""Imports point one way: each part imports from lower levels only; heavy libraries stay where they belong."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmpipe.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/llmpipe"
LEVELS = (
    {"errors"},
    {"files", "progress", "programs", "layout", "helpers", "container", "background"},
    {"hashing", "yaml_file"},
    {"config", "recipe", "families"},
    {"project", "schema"},
    {"data", "parallel"},
    {"checkpoint"},
    {"model"},
    {"inference"},
    {"verify", "train"},
    {"evaluate", "export", "track"},
    {"report", "doctor"},
    {"launch"},
    {"cli"},
    {"__main__"},
)
LEVEL = {part: number for number, level in enumerate(LEVELS) for part in level}
# The parts that may import a library: neither tracking nor evaluation can get in a training's way.
HOME = {
    "mlflow": {"track"},
    "matplotlib": {"track"},
    "lm_eval": {"evaluate"},
    "datasets": {"evaluate"},
    "huggingface_hub": {"checkpoint"},
    "pyarrow": {"data"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_part_has_a_level() -> None:
    assert {part_of(path) for path in modules()} - {"__init__"} == LEVEL.keys() - {"helpers"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    part = part_of(path)
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("llmpipe.")} - {part, "__version__"}
    upward = {other for other in inside if part == "__init__" or LEVEL[other] >= LEVEL[part]}
    assert not upward, f"{path.name} of {part} imports {upward}, which do not stand below it"
    libraries = {name.split(".")[0] for name in imports(path)} & HOME.keys()
    strays = {library for library in libraries if part not in HOME[library]}
    assert not strays, f"{path.name} of {part} imports {strays}"


def test_the_walk_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import llmpipe.cli\ndef f():\n    from llmpipe import train\n    from llmpipe.data.parts import Part\n"
    )
    assert set(imports(path)) == {"llmpipe.cli", "llmpipe.train", "llmpipe.data.parts.Part"}


def test_the_workflow_imports_look_ups_only() -> None:
    found = {
        path.name: set(re.findall(r"^\s*(?:from|import) (llmpipe\S*(?: import .*)?)", path.read_text(), re.MULTILINE))
        for path in [*(ROOT / "workflow").rglob("*.smk"), ROOT / "workflow/Snakefile", ROOT / "demo/Snakefile"]
    }
    assert found.pop("common.smk") == {
        "llmpipe import launch",
        "llmpipe.errors import UserError",
        "llmpipe.project import configs, inputs, left_jobs, needs, options, outputs",
        "llmpipe.train import lease",
    }
    assert not any(found.values()), f"look-ups stand in common.smk: {found}"


def loaded_after(code: str) -> set[str]:
    """The modules that a new process has loaded after some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "sentencepiece", "mlflow", "numpy", "safetensors", "lm_eval", "snakemake"}


def test_what_the_workflow_imports_is_light() -> None:
    assert not loaded_after("from llmpipe import launch; from llmpipe.project import inputs, needs, options") & HEAVY


def test_what_starts_ranks_or_evaluates_does_not_wait_for_what_only_they_need() -> None:
    """Half of the time that torch itself takes to import, for each command."""
    found = loaded_after("import llmpipe.train.preflight, llmpipe.evaluate.evaluate")
    assert not found & {
        "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.pipelining",
        "torch.distributed.tensor", "torch.nn.attention.flex_attention",
    }  # fmt: skip


def test_help_of_every_command_is_light() -> None:
    code = (
        "from click.testing import CliRunner\nfrom llmpipe.cli import group, COMMANDS\n"
        "for command in ((), *((name,) for name in COMMANDS)):\n"
        "    result = CliRunner().invoke(group, [*command, '--help'])\n"
        "    assert result.exit_code == 0, result.output\n"
    )
    assert not loaded_after(code) & HEAVY


def test_every_command_has_an_example() -> None:
    for name in COMMANDS:
        text = (PACKAGE / "cli" / f"{name}.py").read_text()
        assert re.search(rf"\\b\n    Example:\n      llmpipe {name} ", text), f"llmpipe {name} --help shows no example"


def test_training_needs_no_tracking_no_tables_and_no_evaluation_harness() -> None:
    """`llmpipe.train` imports where these libraries are not installed."""
    names = sorted(path.stem for path in (PACKAGE / "train").glob("*.py") if not path.stem.startswith("__"))
    loaded_after(
        "import importlib, sys\n"
        "for library in ('mlflow', 'pyarrow', 'datasets', 'lm_eval'):\n"
        "    sys.modules[library] = None  # an import of it raises ModuleNotFoundError\n"
        f"for name in {names}:\n"
        "    importlib.import_module(f'llmpipe.train.{name}')\n"
    )

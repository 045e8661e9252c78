"""The workflow's own rules: thin rules, lint clean, the Slurm profile."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "workflow/rules").glob("*.smk"))


@pytest.mark.parametrize("project", [".", "demo"])
def test_lint_is_clean(project: str) -> None:
    done = subprocess.run([sys.executable, ".ci/lint_workflow.py", project], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text('rule bare:\n    output:\n        "x",\n    shell:\n        "touch {output}"\n')
    check = [sys.executable, ".ci/lint_workflow.py"]
    done = subprocess.run([*check, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "No log directive defined" in done.stdout
    (tmp_path / "Snakefile").write_text("rule broken\n")
    done = subprocess.run([*check, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "snakemake --lint failed" in done.stdout


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_rules_are_thin(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"^\s+(run|script|notebook|wrapper|retries):", text, re.MULTILINE)
    assert "lambda" not in text
    commands = re.findall(r'shell:\n((?:\s+".*"\n?)+)', text)
    assert len(commands) == text.count("shell:")
    for command in commands:
        joined = "".join(re.findall(r'"(.*)"', command))
        assert re.fullmatch(r"llmpipe [a-z]+ .* --log \{log\}", joined), joined


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_captions_name_wildcards_of_their_rule(path: Path) -> None:
    for rule in re.split(r"(?m)^rule ", path.read_text())[1:]:
        for caption in re.findall(r'caption="(.*)"', rule):
            named = set(re.findall(r"snakemake\.wildcards\.(\w+)", (path.parent / caption).read_text()))
            assert named and named <= set(re.findall(r"\{(\w+)\}", rule)), f"{caption} of {rule.split(':')[0]}"


def test_only_what_needs_the_submitting_host_runs_there() -> None:
    """The network, and sqlite; all else is a node's work."""
    rules = [rule for path in RULES for rule in re.findall(r"(?ms)^rule (\w+):\n(.*?)(?=^\S|\Z)", path.read_text())]
    assert {name for name, text in rules if "localrule: True" in text} == {"download", "track", "track_finetune"}
    assert {"report", "finetune"} <= {name for name, _ in rules}


def test_common_holds_look_ups_only() -> None:
    text = (ROOT / "workflow/rules/common.smk").read_text()
    assert len(text.splitlines()) <= 60
    assert not re.search(r"^rule ", text, re.MULTILINE)


def test_slurm_profile() -> None:
    profile = yaml.safe_load((ROOT / "slurm/config.yaml").read_text())
    assert profile["executor"] == "slurm" and profile["retries"] >= 1 and profile["jobs"]
    assert "slurm-array-jobs" not in profile and profile["slurm-no-requeue"] is True
    assert profile["keep-incomplete"]  # why: the node that hangs in tests/cluster/test_drills.py
    assert (ROOT / "demo/slurm").resolve() == ROOT / "slurm"
    # A workflow profile of this name would be merged into --profile slurm, block by block.
    assert not any((ROOT / folder).exists() for folder in ("workflow/profiles", "profiles", "default"))

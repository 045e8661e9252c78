"""lint_workflow.py PROJECT: `snakemake --lint` of a project's folder, clean but for one wish.

Snakemake wishes each rule had a conda environment or a container of its own. llmpipe is one package in one place and
the rules are its commands: a container a rule would only hide which llmpipe runs. This one kind is set aside.
"""

import subprocess
import sys

SET_ASIDE = "Specify a conda environment or container for each rule.:"


def findings(project: str) -> list[str]:
    """What the linter says besides the wish set aside, a line each."""
    command = [sys.executable, "-m", "snakemake", "--lint"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    said, place, found, wishes = done.stdout + done.stderr, "", [], 0
    for line in said.splitlines():
        if line.startswith("Lints for "):
            place = line.removeprefix("Lints for ")
        elif line.startswith("    * "):
            wishes += line.strip("* ") == SET_ASIDE
            found += [] if line.strip("* ") == SET_ASIDE else [f"{place} {line.strip('* ')}"]
    failed = done.returncode and not found and not wishes
    return [f"snakemake --lint failed:\n{said}"] if failed else found


def main() -> None:
    found = findings(sys.argv[1])
    print("\n".join(found) or f"snakemake --lint in {sys.argv[1]}: clean, containers and conda environments set aside")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

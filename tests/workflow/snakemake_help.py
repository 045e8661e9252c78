"""What Snakemake said, read back."""

import re


def job_counts(said: str) -> dict[str, int]:
    """The first table of job stats, without its total."""
    if "Job stats:" not in said:
        return {}
    table = said[said.index("Job stats:") :].split("\n\n")[0]
    return {name: int(count) for name, count in (line.split() for line in table.splitlines()[3:]) if name != "total"}


def resources_of(said: str) -> dict[str, str]:
    """What each rule's job asks for, as a dry run tells it."""
    return dict(re.findall(r"(?m)^rule (\w+):\n(?: .*\n)*?    resources: (.*)$", said))


def commands(said: str) -> list[str]:
    """The shell commands that `snakemake -p` printed."""
    return [line for line in re.findall(r"^Shell command: (.*)$", said, re.MULTILINE) if line != "None"]

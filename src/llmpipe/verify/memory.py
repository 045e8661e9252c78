"""How much memory this process may still take: the machine's, or its control group's if that is less."""

import os
from pathlib import Path


def available_bytes() -> int:
    """Bytes that are free, page cache included, within the limit of a container or a Slurm job."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_group_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())])


def _group_limits(root: Path, membership: str) -> list[int]:
    """What each control group (v2) that holds this process leaves it."""
    line = next((line for line in membership.splitlines() if line.startswith("0::")), None)
    found: list[int] = []
    group = root / line.removeprefix("0::").lstrip("/") if line else root
    while group.is_relative_to(root):
        limit, used = group / "memory.max", group / "memory.current"
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            found.append(max(0, int(text) - int(used.read_text()) + _cached(group)))
        if group == root:
            break
        group = group.parent
    return found


def _cached(group: Path) -> int:
    """Pages of files: they count as used, and are given back when wanted. After a model was read they are most."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields["inactive_file"]) + int(fields["active_file"])

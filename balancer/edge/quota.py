"""How much of the CPUs this process may use: a container may have a share of their time, however many it sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS, FOUND = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def workers(wanted: int | str) -> int:
    """For the setting of that name: `auto` are as many as there are CPUs to use."""
    if isinstance(wanted, int):
        return wanted
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, quota())))


def quota(groups: Path = GROUPS, found: Path = FOUND) -> float:
    """CPUs' worth of time by the strictest group that this process is in (cgroups(7)); infinite without one. A group is
    held to what those above it may use."""
    lines = ""
    with suppress(OSError):
        lines = groups.read_text(encoding="utf-8")
    shares = [float("inf")]
    for line in lines.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        root = found / controllers if controllers else found
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            shares += _share(folder)
            if folder == root:
                break
    return min(shares)


def _share(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):  # version 2
        most, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        yield int(most) / int(period)  # "max" is no number, and no limit
    with suppress(OSError, ValueError):  # version 1
        most, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
        if int(most) > 0:
            yield int(most) / int(period)

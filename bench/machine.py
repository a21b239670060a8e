"""On what it was measured: the machine, the interpreter of every Python contender, the versions of everything that took
part, and the state of the code."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import timeit
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import HERE
from processes import find_program

STEPS = 1_000
REPEATS = 300
# How each program is asked for its version.
PROGRAMS = {
    **{"Envoy": "envoy --version", "Traefik": "traefik version", "Caddy": "caddy version"},
    **{"nginx": "nginx -v", "HAProxy": "haproxy -v", "wrk": "wrk -v"},
}
PACKAGES = ("Granian", "uvloop", "Flask", "Werkzeug", "requests")


def machine() -> dict[str, Any]:
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    build, is_optimised = build_of(sys.base_prefix, sysconfig.get_config_var("CONFIG_ARGS") or "")
    python = {"version": platform.python_version(), "build": build, "is_optimised": is_optimised}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": model[1].strip() if model else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": python | {"step_ns": round(step_ns(), 3)},
        "versions": versions(),
    }


def about(facts: dict[str, Any]) -> str:
    """What `machine` found, in words, but for what differs from minute to minute."""
    python = f"Python {facts['python']['version']}, {facts['python']['build']}"
    measured = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['cpus']} x {facts['cpu']}, Linux {facts['kernel']}; all Python contenders on {python}; {measured}"


def pace(facts: dict[str, Any]) -> str:
    return f"{facts['python']['step_ns']:.0f} ns for a step of the interpreter's loop"


def versions() -> dict[str, str]:
    """Of what is installed here of the programs and packages that take part."""
    found = {name: program_version(*command.split()) for name, command in PROGRAMS.items()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {name: version for name, version in found.items() if version}


def program_version(name: str, option: str) -> str | None:
    """The first thing in its answer that looks like a version; some say it on stderr, wrk with exit code 1."""
    program = find_program(name)
    if program is None:
        return None
    done = subprocess.run([program, option], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = re.search(r"\d+\.\d+[\w.+~-]*", done.stdout)
    return seen[0] if seen else "of unknown version"


def commit() -> str:
    """With `-dirty` when a file under version control was changed since."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def build_of(prefix: str, configured: str) -> tuple[str, bool]:
    """How the interpreter was built, and whether guided by a profile, which makes it about a fifth faster.

    python.org, uv and Docker's images ask `configure` for that. Debian and Ubuntu do it by calling make themselves and
    leave no trace in the build's own record, and PGO_PROF_USE_FLAG is set in builds without a profile: so what belongs
    to a distribution, this one or one that debootstrap made, is believed, and `step_ns` lets everybody compare.
    """
    if "--enable-optimizations" in configured:
        return "built with profile-guided optimisation", True
    release = Path(prefix, "lib/os-release")
    if Path(prefix).name == "usr" and release.exists():
        name = re.search('^PRETTY_NAME="?([^"\n]+)', release.read_text(), re.MULTILINE)
        return f"the package of {name[1] if name else 'the distribution'}", True
    return "built without profile-guided optimisation", False


@dataclass(slots=True)
class Item:
    name: str
    count: int = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count


def steps(count: int) -> int:
    """What proxies do: look up, call, cut text, make small lists. Do not change it: figures of years compare by it."""
    items = {f"key-{number}": Item(f"key-{number}") for number in range(16)}
    total = 0
    for step in range(count):
        item = items[f"key-{step & 15}"]
        name, _, number = item.name.partition("-")
        parts = [part for part in (name, number) if part]
        total += item.add(len(parts)) if name.startswith("k") else 0
    return total


def step_ns() -> float:
    """Nanoseconds for a step, of the best of many repeats: a busy machine cannot make it less."""
    return min(timeit.repeat(lambda: steps(STEPS), repeat=REPEATS, number=1)) * 1e9 / STEPS

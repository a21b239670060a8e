"""A copy of the project in a path with blanks, to be started by start_all.sh from another directory.

The copy gets a .venv that borrows the packages of the Python that runs the tests, with the stamp that says it is
complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import fetch, wait_until

PROJECT = Path(__file__).resolve().parent.parent

PARTS = (
    "balancer",
    "backend_server.py",
    "dashboard.html",
    "demo",
    "load_balancer.py",
    "requirements.txt",
    "start_all.bat",
    "start_all.py",
    "start_all.sh",
)


def free_ports(count: int) -> list[int]:
    """Below the range of outgoing connections, so that no client takes one before its server does; all at one time, so
    that they differ."""
    with ExitStack() as probes:
        found: list[int] = []
        for port in random.sample(range(20000, 32000), 12000):
            with suppress(OSError):
                probes.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free ports left")


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    return fetch(f"http://127.0.0.1:{port}{path}")


def copy_project(to: Path) -> None:
    for name in PARTS:
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def borrow_venv(tree: Path) -> None:
    venv.create(tree / ".venv", with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    pth = tree / ".venv" / "lib" / version / "site-packages" / "borrowed.pth"
    pth.write_text(sysconfig.get_paths()["purelib"] + "\n")
    stamp = hashlib.sha256((tree / "requirements.txt").read_bytes()).hexdigest()
    (tree / ".venv" / "requirements.sha256").write_text(stamp)


class Run:
    """One running start_all.sh, its output in files so that no pipe is held open."""

    def __init__(self, demo: Demo, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        demo.runs.append(self)
        number = len(demo.runs)
        self.out_file, self.err_file = demo.scratch / f"out{number}", demo.scratch / f"err{number}"
        with self.out_file.open("wb") as out, self.err_file.open("wb") as err:
            self.process = subprocess.Popen(
                [demo.tree / "start_all.sh", *arguments],
                cwd=demo.scratch,
                env={**demo.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return self.out_file.read_text()

    @property
    def err(self) -> str:
        return self.err_file.read_text()

    def until(self, text: str) -> None:
        wait_until(lambda: text in self.out or self.process.poll() is not None)
        assert text in self.out, self.err

    def end(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def assert_one_line_error(self, code: int, *words: str) -> None:
        assert self.end() == code, self.err
        assert self.err.startswith("start_all: error: ")
        assert len(self.err.splitlines()) == 1
        for word in words:
            assert word in self.err


class Demo:
    """A copy of the project and ports of its own."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        self.tree, self.scratch = tree, scratch
        scratch.mkdir(exist_ok=True)
        python = scratch / "python3.14"  # the first that is looked for, or shims may be asked that take long
        python.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).resolve()}" "$@"\n')
        python.chmod(0o755)
        self.runs: list[Run] = []
        self.port, *self.backend_ports = free_ports(4)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LB_", "SERVER_", "RESPONSE_"))}
        ports = " ".join(map(str, self.backend_ports))
        path = f"{scratch}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**inherited, "PATH": path, "LB_PORT": str(self.port), "BACKEND_PORTS": ports}
        self.environment.pop("ALGORITHM", None)

    def start(self, *arguments: str, **environment: str) -> Run:
        return Run(self, arguments, environment)

    def ready(self, *arguments: str, **environment: str) -> Run:
        run = self.start(*arguments, **environment)
        run.until("Stop with")
        return run

    def processes(self, part: str = "") -> list[psutil.Process]:
        """Every process that runs a file of this tree."""
        wanted = str(self.tree / part)
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(word.startswith(wanted) and word.endswith(".py") for word in process.info["cmdline"] or ())
        ]

    def the(self, script: str, port: int | None = None) -> psutil.Process:
        (found,) = [p for p in self.processes(script) if port is None or str(port) in p.info["cmdline"]]
        return found

    def assert_nothing_left(self) -> None:
        wait_until(lambda: not self.processes())
        assert not [port for port in (self.port, *self.backend_ports) if connects(port)]
        assert {path.name for path in (self.tree / "run").iterdir()} <= {"lock", "access.lock"}

    def entries(self) -> dict[str, dict[str, Any]]:
        """What run/access.js tells dashboard.html, by the name of the balancer's pid file."""
        code = (self.tree / "run" / "access.js").read_text()
        assert (code[:19], code[-2:]) == ("window.LB_ACCESS = ", ";\n")
        return json.loads(code[19:-2])  # type: ignore[no-any-return]

    def entry(self) -> dict[str, Any]:
        return self.entries()[f"balancer-{self.port}"]

    def healthy(self) -> dict[str, bool]:
        status = json.loads(get(self.port, "/status")[2])
        return {backend["id"]: backend["healthy"] for backend in status["backend_servers"]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("start all") / "a päth with (blanks) & 'quotes'"
    tree.mkdir()
    copy_project(tree)
    borrow_venv(tree)
    return tree


@pytest.fixture
def demo(tree: Path, tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tree, tmp_path)
    yield demo
    for process in demo.processes():
        process.kill()
    for run in demo.runs:
        run.end()
    for path in (tree / "run").glob("*.pid"):
        path.unlink()


@pytest.fixture(scope="module")
def bare_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without .venv, whose requirements are none."""
    tree = tmp_path_factory.mktemp("bare") / "with blanks"
    tree.mkdir()
    copy_project(tree)
    (tree / "requirements.txt").write_text("# nothing\n")
    for program in ("backend_server.py", "balancer/commandline.py"):  # which need nothing then
        (tree / program).write_text("")
    return tree


@pytest.fixture
def bare(bare_tree: Path, tmp_path: Path) -> Demo:
    return Demo(bare_tree, tmp_path)


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)

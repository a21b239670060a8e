"""`pip install .` gives a command that works from anywhere, with what it needs and nothing from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PYTHON, ROOT, Process, fetch, wait_until

from balancer import __version__

LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "venv", "build", "*.egg-info", "__pycache__", ".*_cache", "*.log")

pytestmark = pytest.mark.timeout(300)  # it resolves and installs every dependency, as a user's pip does


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LB_", "PYTHON"))}
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The installed `load-balancer`. Built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("installed with a blank")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    assert run(PYTHON, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [scripts / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    done = run(*pip, folder / "source", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "source")  # nothing may be needed from it any more
    assert run(scripts / "python", "-m", "pip", "check", cwd=folder).returncode == 0
    yield scripts / "load-balancer"
    shutil.rmtree(folder)  # some 100 MB that pytest would keep


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path


def test_the_command_says_its_version(command: Path, elsewhere: Path) -> None:
    done = run(command, "--version", cwd=elsewhere)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"load-balancer {__version__}", "")


def test_the_command_checks_a_configuration(command: Path, elsewhere: Path) -> None:
    (elsewhere / "lb.toml").write_text('algorithm = "round_robin"\n[[backends]]\nurl = "http://127.0.0.1:8080"\n')
    done = run(command, "--config", "lb.toml", "--check-config", cwd=elsewhere)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "configuration ok", "")
    done = run(command, "--algorithm", "fastest", "--check-config", cwd=elsewhere)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "fastest" in done.stderr


def test_hangup_while_the_command_starts_waits_until_it_has_started(command: Path, elsewhere: Path) -> None:
    """It killed the installed command, which unlike `python load_balancer.py` did not hold it back."""
    process = Process([str(command), "--port=0", "--backend=http://127.0.0.1:9"], cwd=elsewhere)
    try:
        wait_until(process.holds_hangup, what="its first lines have run")
        process.send(signal.SIGHUP)
        assert process.wait() == 0
        assert "listening" in process.output
    finally:
        process.stop()


def test_ctrl_c_while_the_command_starts_shows_no_traceback(command: Path, elsewhere: Path) -> None:
    process = Process([str(command), "--port=0", "--backend=http://127.0.0.1:9"], cwd=elsewhere)
    try:
        wait_until(process.holds_hangup, what="its first lines have run")
        process.send(signal.SIGINT)
        assert process.wait() in (-signal.SIGINT, 130)
        assert "Traceback" not in process.output
    finally:
        process.stop()


@pytest.fixture
def running(command: Path, elsewhere: Path) -> Iterator[str]:
    """The URL of the installed balancer, started from an empty folder."""
    process = Process([str(command), "--port=0", "--backend=http://127.0.0.1:9"], cwd=elsewhere)
    try:
        found = wait_until(lambda: re.search(r"listening on (http://\S+)", process.output), 20, "it listens")
        url: str = found.group(1)

        def answers() -> bool:
            try:
                return fetch(f"{url}/health")[0] == 200
            except OSError:
                return False

        wait_until(answers)
        yield url
    finally:
        process.stop()


def test_the_installed_balancer_serves_and_has_its_dashboard(running: str) -> None:
    assert fetch(f"{running}/status")[0] == 200
    assert fetch(f"{running}/openapi.json")[0] == 200
    status, _, page = fetch(f"{running}/dashboard")
    assert status == 200
    assert page == (ROOT / "dashboard.html").read_bytes()

"""A wheel gives a command and a library that work from anywhere, with what they need and nothing from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import free_ports
from support import PYTHON, ROOT, Process, fetch, wait_until

from balancer import __version__
from balancer.testing import Backend

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
    assert run(PYTHON, "-m", "venv", "--without-pip", folder / "venv", cwd=folder).returncode == 0
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [PYTHON, "-m", "pip", "--python", scripts / "python", "--disable-pip-version-check", "--no-input"]
    # The sdist, and from that the wheel.
    done = run(PYTHON, "-m", "build", "--quiet", "--outdir", folder, folder / "source", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "source")  # nothing may be needed from it any more
    done = run(*pip, "install", "--quiet", "--no-compile", *folder.glob("*.whl"), "pytest", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(*pip, "check", cwd=folder).returncode == 0
    yield scripts / "load-balancer"
    shutil.rmtree(folder)  # some 100 MB that pytest would keep


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path


def test_the_command_says_its_version_and_checks_a_configuration(command: Path, elsewhere: Path) -> None:
    done = run(command, "--version", cwd=elsewhere)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"load-balancer {__version__}", "")
    (elsewhere / "lb.toml").write_text('algorithm = "round_robin"\n[[backends]]\nurl = "http://127.0.0.1:8080"\n')
    done = run(command, "--config", "lb.toml", "--check-config", cwd=elsewhere)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "configuration ok", "")
    done = run(command, "--algorithm", "fastest", "--check-config", cwd=elsewhere)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "fastest" in done.stderr
    told = run(command, "--help", cwd=elsewhere).stdout
    assert done.stderr.startswith("load-balancer: ") and told.startswith("usage: load-balancer ")
    assert "load_balancer.py" not in told


def test_hangup_while_the_command_starts_waits_until_it_has_started(command: Path, elsewhere: Path) -> None:
    """It killed the installed command, which unlike `python load_balancer.py` did not hold it back."""
    with Process([str(command), "--port=0", "--backend=http://127.0.0.1:9"], cwd=elsewhere) as process:
        wait_until(process.holds_hangup, what="its first lines have run")
        process.send(signal.SIGHUP)
        assert process.wait() == 0
        assert "listening" in process.output


def test_ctrl_c_while_the_command_starts_shows_no_traceback(command: Path, elsewhere: Path) -> None:
    with Process([str(command), "--port=0", "--backend=http://127.0.0.1:9"], cwd=elsewhere) as process:
        wait_until(process.holds_hangup, what="its first lines have run")
        process.send(signal.SIGINT)
        assert process.wait() in (-signal.SIGINT, 130)
        assert "Traceback" not in process.output


@pytest.fixture
def running(command: Path, elsewhere: Path, backend_factory: Callable[..., Backend]) -> Iterator[str]:
    """The URL of the installed balancer, started from an empty folder in front of one backend."""
    backend = backend_factory(body=b"from the backend")
    with Process([str(command), "--port=0", f"--backend={backend.url}"], cwd=elsewhere) as process:
        found = wait_until(lambda: re.search(r"listening on (http://\S+)", process.output), "it listens")
        yield found.group(1)


def test_the_installed_balancer_forwards_and_has_its_dashboard(running: str) -> None:
    assert fetch(f"{running}/x")[::2] == (200, b"from the backend")
    assert fetch(f"{running}/status")[0] == 200
    assert fetch(f"{running}/openapi.json")[0] == 200
    status, _, page = fetch(f"{running}/dashboard")
    assert status == 200
    assert page == (ROOT / "dashboard.html").read_bytes()


def test_the_demo_starts_from_anywhere_and_leaves_nothing(command: Path, elsewhere: Path) -> None:
    port, *backends = free_ports(4)
    state = elsewhere / "state"
    env = {"LB_PORT": str(port), "BACKEND_PORTS": " ".join(map(str, backends)), "XDG_STATE_HOME": str(state)}
    with Process([str(command), "demo"], env=env, cwd=elsewhere) as process:
        wait_until(lambda: "Stop with Ctrl-C" in process.output or process.popen.poll() is not None, "it is ready")
        assert fetch(f"http://127.0.0.1:{port}/api/process")[0] == 200, process.output
        assert run(command, "--probe", f"--port={port}", cwd=elsewhere).returncode == 0
        assert f"{command.parent}" in process.output and "dashboard.html" not in process.output
        process.send(signal.SIGINT)
        assert process.wait() == 130
    assert run(command, "--probe", f"--port={port}", cwd=elsewhere).returncode == 1
    assert {path.name for path in (state / "load-balancer" / "run").iterdir()} <= {"lock", "access.lock"}
    assert not (elsewhere / "run").exists() and not (elsewhere / "logs").exists()


def test_its_documents_are_installed(command: Path) -> None:
    share = command.parents[1] / "share"
    for name, place in (
        ("load-balancer.1", "man/man1"),
        ("settings.md", "doc/load-balancer"),
        ("examples/gateway.toml", "doc/load-balancer"),
    ):
        assert (share / place / name).read_bytes() == (ROOT / "docs" / name).read_bytes()


FAILING = """
from urllib.request import urlopen
from balancer import LoadBalancer

def test_failover(load_balancer, backend_factory):
    good, bad = backend_factory("good"), backend_factory("bad", fault="reset")
    lb: LoadBalancer = load_balancer([good, bad], algorithm="round_robin")
    while len(lb.events()) < 2:
        pass
    for path in "/one", "/two":
        assert urlopen(lb.url + path).status == 200
    assert not bad.received

def test_without_a_balancer(backend_factory):
    assert not backend_factory().url
"""


def test_pytest_finds_the_fixtures_and_a_failed_test_says_what_happened_and_why(command: Path, elsewhere: Path) -> None:
    (elsewhere / "test_failing.py").write_text(FAILING)
    done = run(command.with_name("python"), "-m", "pytest", "-p", "no:cacheprovider", cwd=elsewhere)
    assert "2 failed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Load balancer http://127.0.0.1:") == 1
    for line in (
        "backend_up good: answers its health check",
        "GET /one: 200 in",
        "bad: http://127.0.0.1:",
        "; round_robin among good (0 in flight), bad (0 in flight)",
        "not bad: already tried",
    ):
        assert line in done.stdout, done.stdout


def test_the_wheel_is_typed(command: Path, elsewhere: Path) -> None:
    show = "import balancer, pathlib; print((pathlib.Path(balancer.__file__).parent / 'py.typed').exists())"
    assert run(command.with_name("python"), "-c", show, cwd=elsewhere).stdout == "True\n"

"""What systemd is told of a balancer: ready, reloading, alive, stopping; and what its unit takes from it."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PATIENCE, ROOT, BalancerProcess, free_port

from balancer.edge.supervisor import Supervisor


class Listener:
    """In the place of systemd."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(PATIENCE)

    def next(self) -> dict[str, str]:
        """The next message; signs of life are passed over."""
        while (text := self.socket.recv(4096).decode()) == "WATCHDOG=1":
            pass
        return dict(line.split("=", 1) for line in text.split("\n"))


@pytest.fixture(params=["file", "abstract"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "notify") if request.param == "file" else f"@{tmp_path}"


@pytest.fixture
def listener(name: str) -> Iterator[Listener]:
    made = Listener(name.replace("@", "\0"))
    with made.socket:
        yield made


def test_each_step_of_a_life_is_told(name: str, listener: Listener, tmp_path: Path) -> None:
    file = tmp_path / "lb.toml"
    file.write_text(f'drain_timeout = 3\nshutdown_delay = 0.25\nbackends = ["http://127.0.0.1:{free_port()}"]\n')
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "100000"}
    with BalancerProcess(f"--config={file}", env=env, wait_ready=False) as balancer:
        assert listener.next() == {"READY": "1"}
        for text in ("retries = 1\n", "retries = nonsense\n"):
            file.write_text(file.read_text() + text)
            before = time.monotonic_ns() // 1000
            balancer.send(signal.SIGHUP)
            told = listener.next()
            assert set(told) == {"RELOADING", "MONOTONIC_USEC"} and int(told["MONOTONIC_USEC"]) >= before
            assert listener.next() == {"READY": "1"}
        for _ in range(3):
            assert listener.socket.recv(4096) == b"WATCHDOG=1"
        balancer.send(signal.SIGTERM)
        assert listener.next() == {"STOPPING": "1", "EXTEND_TIMEOUT_USEC": "13250000"}
        assert balancer.wait() == 0
        assert "configuration not reloaded" in balancer.output


def test_one_that_does_not_listen_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    with BalancerProcess(env={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as balancer:
        balancer.send(signal.SIGTERM)
        assert balancer.wait() == 0
        assert "NOTIFY_SOCKET: READY=1 is not told" in balancer.output


@pytest.mark.parametrize(("usec", "pid", "seconds"), [("30000000", "", 15), ("1", "1", 0), ("soon", "", 0)])
def test_a_watchdog_of_another_process_is_not_ours(usec: str, pid: str, seconds: float) -> None:
    environ = {"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid, "NOTIFY_SOCKET": "vsock:2:1", "OTHER": "x"}
    supervisor = Supervisor(environ)
    assert supervisor._pulse == seconds and environ == {"OTHER": "x"}
    supervisor.ready()


UNIT = ROOT / "deploy" / "systemd" / "load-balancer.service"


def test_the_unit_takes_all_but_what_is_needed() -> None:
    program = shutil.which("systemd-analyze")
    assert program is not None, "apt-get install systemd"
    rated = subprocess.run(
        [program, "security", "--offline=true", "--threshold=20", UNIT], capture_output=True, text=True
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr  # 2.0 at most
    unit = dict(re.findall(r"(?m)^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8")))
    assert (unit["Type"], unit["SystemCallFilter"]) == ("notify-reload", "~@privileged")  # not ~@resources: pinning

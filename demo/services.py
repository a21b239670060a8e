"""The processes of the demo."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from demo.access import page_token
from demo.console import Failure
from demo.places import HERE, LOGS, RUN, VENV_PYTHON, last_line, open_log
from demo.ports import answers
from demo.processes import has_ended, kill_group
from demo.runfiles import remove_pid, write_pid
from demo.settings import Settings, parse_port
from demo.signals import STOP, pause


@dataclass
class Service:
    """One process of the demo, and how to tell that it works."""

    name: str
    port: int
    script: str
    arguments: list[str]
    ready_path: str
    ready_port: int  # where that is asked for: the control API may have a port of its own
    port_setting: str  # what to change if the port is taken
    environment: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        return [str(VENV_PYTHON), str(HERE / self.script), *self.arguments]

    @property
    def log(self) -> Path:
        """The port is in the name so that two demos on different ports keep apart."""
        return LOGS / f"{self.name}-{self.port}.log"

    @property
    def pid_file(self) -> Path:
        return RUN / f"{self.name}-{self.port}.pid"

    @property
    def exit_code(self) -> int | None:
        """None while it runs. What a killed one may have left goes with it: its own children are in its group."""
        if not self.process:
            return None
        if self.process.returncode is None and has_ended(self.process.pid):
            kill_group(self.process.pid)
        return self.process.poll()

    def start(self, detached: bool) -> None:
        # A session of its own: Ctrl-C then reaches only this program, which stops its processes in the right order.
        # On Windows the console tells them all at once, which is quick and does no harm.
        with open_log(self.log) as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=HERE,
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=windows_flags() if detached else 0,
            )
        write_pid(self.pid_file, self.process.pid, self.script)

    def is_ready(self) -> bool:
        if self.exit_code is not None:
            raise Failure(f"{self.name} ended at once with code {self.exit_code}: {last_line(self.log)} ({self.log})")
        return answers(self.host, self.ready_port, self.ready_path)

    def terminate(self) -> None:
        """Ask it to end; Ctrl-C is passed on as Ctrl-C, which servers obey sooner than SIGTERM."""
        interrupted = STOP.number == signal.SIGINT
        if self.process and self.exit_code is None and not (os.name == "nt" and interrupted):
            self.process.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Until it has ended; killed at the deadline or at the second signal."""
        while self.process and self.exit_code is None:
            if time.monotonic() > deadline or STOP.count > 1:
                self.process.kill()
            pause()
        remove_pid(self.pid_file, self.process.pid if self.process else None)


def windows_flags() -> int:
    """No console window of its own, and no Ctrl-C from this one. Zero elsewhere."""
    return getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)


def backend_services(settings: Settings) -> list[Service]:
    delay = os.environ.get("RESPONSE_DELAY", "").strip()
    return [
        Service(
            name=f"backend_{number}",
            port=port,
            script="backend_server.py",
            # Flags, not environment, so that the printed command is the whole truth in every shell.
            arguments=["--id", f"backend_{number}", "--port", str(port), "--host", "127.0.0.1"]
            + (["--delay", delay] if delay else []),
            ready_path="/health",
            ready_port=port,
            port_setting="BACKEND_PORTS",
        )
        for number, port in enumerate(settings.backend_ports, start=1)
    ]


def control_prefix() -> str:
    return os.environ.get("LB_CONTROL_PREFIX", "").strip().rstrip("/")


def balancer_service(settings: Settings) -> Service:
    environment = {
        "LB_PORT": str(settings.balancer_port),
        "LB_EXPOSE_BACKEND": os.environ.get("LB_EXPOSE_BACKEND", "true"),  # the demo shows who answered
        # Beside an admin token too: that one is the user's, and is written to no file.
        "LB_PAGE_TOKEN": page_token(os.environ),
    }
    if settings.ports_given:
        environment["LB_BACKENDS"] = os.environ.get("LB_BACKENDS", "") or settings.backends
    host = os.environ.get("LB_HOST", "").strip()
    control_port = os.environ.get("LB_CONTROL_PORT", "").strip()
    return Service(
        name="balancer",
        port=settings.balancer_port,
        script="load_balancer.py",
        arguments=[],
        ready_path=control_prefix() + "/readyz",
        ready_port=parse_port("LB_CONTROL_PORT", control_port) if control_port else settings.balancer_port,
        port_setting="LB_PORT",
        environment=environment,
        host="127.0.0.1" if host in ("", "localhost", "0.0.0.0", "::") else host.strip("[]"),
    )

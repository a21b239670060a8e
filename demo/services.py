"""The processes of the demo: what the environment says of them, and each from its start to its end."""

import http.client
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from demo.console import STOP, Failure, pause
from demo.files import (
    HERE,
    LOGS,
    MEMORY,
    PYTHON,
    RUN,
    last_line,
    make_private,
    open_log,
    remove_pid,
    write_pid,
    write_private,
)
from demo.processes import kill_orphans

WEIGHTS = (3, 2, 1)  # of the first backends; further ones weigh 1
SCALING = """\
[[scaling]]
min = 1
max = 6
target_in_flight = 4
down_after = 15
command = {command}
"""
# On Windows: no console window of its own, and no Ctrl-C from this one. Zero elsewhere.
DETACHED = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)


@dataclass
class Service:
    """One process of the demo, and how to tell that it works."""

    name: str
    port: int
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    control_port: int = 0  # where it says that it is ready: the control API may have a port of its own
    control_prefix: str = ""
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.is_balancer = self.name == "balancer"
        self.script = "load_balancer.py" if self.is_balancer else "backend_server.py"
        self.command = [str(PYTHON), str(HERE / self.script), *self.arguments]
        # The port is in the names so that two demos on different ports keep apart.
        self.log: Path = LOGS / f"{self.name}-{self.port}.log"
        self.pid_file: Path = RUN / f"{self.name}-{self.port}.pid"

    @property
    def last_words(self) -> str:
        return f"{last_line(self.log)} ({self.log})"

    @property
    def address(self) -> str:
        """Where this machine reaches it."""
        return "127.0.0.1" if self.host in ("localhost", "0.0.0.0", "::") else self.host

    @property
    def exit_code(self) -> int | None:
        """None while it runs. What a killed one may have left goes with it: its own children are in its group."""
        if self.process and self.process.returncode is None:
            kill_orphans(self.process.pid)
        return self.process.poll() if self.process else None

    def start(self, detached: bool) -> None:
        make_private(MEMORY)
        # A session of its own: Ctrl-C then reaches only this program, which stops its processes in the right order.
        # On Windows the console tells them all at once, which is quick and does no harm.
        with open_log(self.log) as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=DETACHED if detached else 0,
            )
        write_pid(self.pid_file, self.process.pid, self.script)

    def is_ready(self) -> bool:
        if self.exit_code is not None:
            raise Failure(f"{self.name} ended at once with code {self.exit_code}: {self.last_words}")
        return self.ask("/readyz" if self.is_balancer else "/health") is not None

    def ask(self, path: str, token: str = "") -> bytes | None:
        """The body of a GET that is answered with 200. No urllib: it would obey the machine's HTTP_PROXY."""
        connection = http.client.HTTPConnection(self.address, self.control_port or self.port, timeout=1)
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            connection.request("GET", self.control_prefix + path, headers=headers)
            answer = connection.getresponse()
            return answer.read() if answer.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def let_go(self) -> None:
        """It goes on without us."""
        if self.process:
            self.process.returncode = 0  # else Python could warn that nobody has waited for it

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


def backend_services(environ: Mapping[str, str]) -> list[Service]:
    delay = environ.get("RESPONSE_DELAY", "").strip()
    # Flags, not environment, so that the printed command is the whole truth in every shell.
    more = ["--host", "127.0.0.1", *(["--delay", delay] if delay else [])]
    names = [(f"backend_{number}", port) for number, port in enumerate(read_ports(environ)[1:], 1)]
    return [Service(name, port, ["--id", name, "--port", str(port), *more]) for name, port in names]


def balancer_service(environ: Mapping[str, str], *arguments: str) -> Service:
    port, *backend_ports = read_ports(environ)
    variables = {
        "LB_PORT": str(port),
        "LB_EXPOSE_BACKEND": environ.get("LB_EXPOSE_BACKEND", "true"),  # the demo shows who answered
        "LB_DEMO_FAULTS": environ.get("LB_DEMO_FAULTS", "true"),
        # A new one for each start, beside an admin token too: that one is the user's, and is written to no file.
        "LB_PAGE_TOKEN": given_token(environ) or secrets.token_urlsafe(32),
    }
    if "LB_STATE_FILE" not in environ and not environ.get("LB_CONFIG", "").strip():  # whose file may name another
        variables["LB_STATE_FILE"] = str(MEMORY / f"balancer-{port}.db")
    if environ.get("BACKEND_PORTS", "").strip(" ,"):  # else the balancer knows them
        weights = dict(enumerate(WEIGHTS))
        each = [f"backend_{n + 1}=http://127.0.0.1:{at}@{weights.get(n, 1)}" for n, at in enumerate(backend_ports)]
        variables["LB_BACKENDS"] = environ.get("LB_BACKENDS", "") or ",".join(each)
    control_port = environ.get("LB_CONTROL_PORT", "").strip()
    return Service(
        "balancer",
        port,
        list(arguments),
        environment=variables,
        host=environ.get("LB_HOST", "").strip().strip("[]") or "127.0.0.1",
        control_port=parse_port("LB_CONTROL_PORT", control_port) if control_port else port,
        control_prefix=environ.get("LB_CONTROL_PREFIX", "").strip().rstrip("/"),
    )


def scaling_service(environ: Mapping[str, str], *arguments: str) -> Service:
    """A balancer that starts its backends itself."""
    if environ.get("LB_CONFIG", "").strip():
        raise Failure("--scale has a configuration of its own; unset LB_CONFIG, or put [[scaling]] into that file", 2)
    environ = {**environ, "BACKEND_PORTS": ""}  # it chooses free ones
    backend = shlex.join([str(PYTHON), str(HERE / "backend_server.py")])
    file = MEMORY / f"scaling-{read_ports(environ)[0]}.toml"
    write_private(file, SCALING.format(command=json.dumps(f"{backend} --port {{port}} --id {{id}}")))
    return balancer_service(environ, "--config", str(file), *arguments)


def read_ports(environ: Mapping[str, str]) -> list[int]:
    """Of the balancer, then of the backends."""
    balancer = environ.get("LB_PORT", "").strip() or "9000"
    backends = environ.get("BACKEND_PORTS", "").replace(",", " ").split()
    found = [parse_port("BACKEND_PORTS", text) for text in backends or ("5001", "5002", "5003")]
    ports = [parse_port("LB_PORT", balancer), *found]
    if len(set(ports)) < len(ports):
        named = f"LB_PORT={balancer} BACKEND_PORTS={' '.join(backends)}"
        raise Failure(f"two processes cannot have the same port: {named}", 2)
    return ports


def parse_port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failure(f"{name} must hold port numbers from 1 to 65535, not {text!r}", 2)
    return int(text)


def given_token(environ: Mapping[str, str]) -> str:
    """The user's own, found as the balancer finds it; empty if there is none."""
    path = environ.get("LB_PAGE_TOKEN_FILE", "").strip()
    if not path:
        return environ.get("LB_PAGE_TOKEN", "").strip()
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"LB_PAGE_TOKEN_FILE={path}: {getattr(error, 'strerror', None) or error}", 2) from None

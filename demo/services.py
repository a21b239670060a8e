"""The processes of the demo: what the environment says of them, and each from its start to its end."""

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import HTTPHandler, OpenerDirector, Request

from demo import files
from demo.console import SIGNALS, Failure

STOP_SECONDS = 10.0  # then a process is killed
SCALING = "scaling = [{{ min = 1, max = 6, target_in_flight = 4, down_after = 15, command = {} }}]\n"
# On Windows: no console window of its own, and no Ctrl-C from this one. Zero elsewhere.
DETACHED = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)
(DIRECT := OpenerDirector()).add_handler(HTTPHandler())  # whatever HTTP_PROXY is, and for which a 503 is an answer


class Service:
    """One process of the demo. The port is in its names so that two demos on different ports keep apart."""

    def __init__(self, name: str, port: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name, self.port, self.environment = name, port, environment
        self.is_balancer = name == "balancer"
        self.script = "load_balancer.py" if self.is_balancer else "backend_server.py"
        self.command = [str(files.PYTHON), str(files.HERE / self.script), *arguments]
        self.log, self.pid_file = files.LOGS / f"{name}-{port}.log", files.RUN / f"{name}-{port}.pid"
        self.process: subprocess.Popen[bytes] | None = None
        host = given(environment, "LB_HOST", "127.0.0.1").strip("[]")
        self.address = "127.0.0.1" if host in ("localhost", "0.0.0.0", "::") else host  # for this machine
        self.control_port = parse_port("LB_CONTROL_PORT", given(environment, "LB_CONTROL_PORT", str(port)))
        self.urls = self._urls(host, port)
        self.control_urls = self._urls(host, self.control_port, given(environment, "LB_CONTROL_PREFIX").rstrip("/"))

    def _urls(self, host: str, port: int, prefix: str = "") -> list[str]:
        """The last is the one that people like to read, if it leads to this one alone: to browsers and curl localhost
        is ::1 as well as 127.0.0.1 (RFC 6761 section 6.3), where another may listen."""
        hosts = [f"[{self.address}]" if ":" in self.address else self.address]
        if hosts == ["127.0.0.1"] and (host == "::" or not is_answered("::1", port)):
            hosts.append("localhost")
        return [f"http://{host}:{port}{prefix}" for host in hosts]

    def start(self, detached: bool) -> None:
        # A session of its own: Ctrl-C then reaches only this program, which stops its processes in the right order.
        with files.open_new(self.log) as output:
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=DETACHED if detached else 0,
            )
        entry = {"urls": self.control_urls, "token": self.environment["LB_PAGE_TOKEN"]} if self.is_balancer else None
        files.write_pid(self.pid_file, self.process.pid, self.script, entry)

    @property
    def how_it_ended(self) -> str:
        """Empty while it runs, or before it was started."""
        if (code := self.process.poll() if self.process else None) is None:
            return ""
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    def is_ready(self) -> bool:
        if how := self.how_it_ended:
            raise Failure(f"{self.name} ended at once ({how}): {files.last_words(self.log)}")
        return self.ask("/readyz" if self.is_balancer else "/health") is not None

    def ask(self, path: str) -> Any:
        """What a GET of its control API brings; None if that is no 200."""
        headers = {"Authorization": f"Bearer {self.environment['LB_PAGE_TOKEN']}"} if self.is_balancer else {}
        try:
            with DIRECT.open(Request(self.control_urls[0] + path, headers=headers), timeout=1) as answer:
                return json.load(answer) if answer.status == 200 else None
        except (OSError, HTTPException, ValueError):
            return None

    def stop(self) -> None:
        if process := self.process:
            end(process.pid, lambda: process.poll() is None)
            if files.read_pid(self.pid_file) is None:  # it may name another one by now: the one started in its place
                self.pid_file.unlink(missing_ok=True)


def end(pid: int, is_running: Callable[[], bool], seconds: float = STOP_SECONDS) -> None:
    """Ask it to end; it is killed if that takes longer, or at a second signal. Ctrl-C is passed on as Ctrl-C, which
    servers obey sooner than SIGTERM; on Windows the console has told them all at once."""
    deadline = time.monotonic() + seconds
    number = signal.SIGINT if SIGNALS[:1] == [signal.SIGINT] else signal.SIGTERM
    with suppress(ProcessLookupError):  # it has ended since we looked
        if is_running() and not (os.name == "nt" and number == signal.SIGINT):
            os.kill(pid, number)
        while is_running():
            if time.monotonic() > deadline or len(SIGNALS) > 1:
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            time.sleep(0.05)


def is_answered(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=1):
        return True
    return False


def given(environ: Mapping[str, str], name: str, usual: str = "") -> str:
    return environ.get(name, "").strip() or usual


def backend_services(environ: Mapping[str, str]) -> list[Service]:
    # Flags, not environment, so that the printed command is the whole truth in every shell.
    more = ["--host", "127.0.0.1", *(["--delay", delay] if (delay := given(environ, "RESPONSE_DELAY")) else [])]
    names = [(f"backend_{number}", port) for number, port in enumerate(read_ports(environ)[1:], 1)]
    return [Service(name, port, ["--id", name, "--port", str(port), *more], {}) for name, port in names]


def balancer_service(environ: Mapping[str, str], *arguments: str) -> Service:
    port, *backend_ports = read_ports(environ)
    if (host := given(environ, "LB_HOST")).startswith("unix:"):
        raise Failure(f"LB_HOST={host}: the demo listens on ports; load_balancer.py alone takes a Unix socket", 2)
    settings = {"LB_EXPOSE_BACKEND": "true", "LB_DEMO_FAULTS": "true"}  # the demo shows who answered
    if not given(environ, "LB_CONFIG"):  # whose file may name another
        settings["LB_STATE_FILE"] = str(files.MEMORY / f"balancer-{port}.db")
    if given(environ, "BACKEND_PORTS"):  # else the balancer knows them, and weighs them like this
        each = [f"backend_{n}=http://127.0.0.1:{at}@{max(4 - n, 1)}" for n, at in enumerate(backend_ports, 1)]
        settings["LB_BACKENDS"] = ",".join(each)
    path = given(environ, "LB_PAGE_TOKEN_FILE")  # the balancer prefers it
    try:
        token = Path(path).read_text(encoding="utf-8").strip() if path else given(environ, "LB_PAGE_TOKEN")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"LB_PAGE_TOKEN_FILE={path}: {getattr(error, 'strerror', None) or error}", 2) from None
    # A new one for each start, beside an admin token too: that one is the user's, and is written to no file.
    own = {"LB_PORT": str(port), "LB_PAGE_TOKEN": token or secrets.token_urlsafe(32)}
    return Service("balancer", port, arguments, {**settings, **environ, **own})


def scaling_service(environ: Mapping[str, str], *arguments: str) -> Service:
    """A balancer that starts its backends itself."""
    if given(environ, "LB_CONFIG"):
        raise Failure("--scale has a configuration of its own; unset LB_CONFIG, or put [[scaling]] into that file", 2)
    command = shlex.join([str(files.PYTHON), str(files.HERE / "backend_server.py")]) + " --port {port} --id {id}"
    file = files.MEMORY / "scaling.toml"
    files.make_folders()
    files.write_new(file, SCALING.format(json.dumps(command)))
    return balancer_service({**environ, "BACKEND_PORTS": ""}, "--config", str(file), *arguments)  # it chooses free ones


def read_ports(environ: Mapping[str, str]) -> list[int]:
    """Of the balancer, then of the backends."""
    backends = given(environ, "BACKEND_PORTS", "5001 5002 5003").replace(",", " ")
    ports = [parse_port("LB_PORT", given(environ, "LB_PORT", "9000"))]
    ports += [parse_port("BACKEND_PORTS", text) for text in backends.split()]
    if len(set(ports)) < len(ports):
        raise Failure(f"two processes cannot have the same port: LB_PORT={ports[0]} BACKEND_PORTS={backends}", 2)
    return ports


def parse_port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failure(f"{name} must hold port numbers from 1 to 65535, not {text!r}", 2)
    return int(text)

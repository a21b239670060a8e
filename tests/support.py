"""What the tests share: balancers and processes on free ports, raw clients."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import ValidationError

from balancer.balancing.backends import Backend, Choice, Scene
from balancer.commandline import make_parser
from balancer.config import settings
from balancer.config.settings import Settings
from balancer.loadbalancer import LoadBalancer
from balancer.observe.record import Attempt, Record
from balancer.protocol.origin import Origin

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PAGE_TOKEN = "the-page-token-of-a-test"
PATIENCE = 60.0  # seconds; a slow machine is no finding


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(predicate: Callable[[], Any], what: str = "") -> Any:
    """Poll until `predicate` is true; returns its value. Fails the test when that takes longer than any machine."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {PATIENCE:g} s: {what or predicate}")
        pause.wait(0.02)


def fetch(url: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers with lower-case names, body); a dict as `body` is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content_Type", "application/json")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, method=method, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def is_good(url: str) -> bool:
    """Whether somebody is there, and answers 200."""
    with suppress(OSError):
        return fetch(url)[0] == 200
    return False


def fetch_json(url: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
    return json.loads(fetch(url, body, method, **headers)[2])


def options(kind: Any, **settings: Any) -> Any:
    """What a part gets of the default settings but for these."""
    return Settings(**settings).options(kind)


def another_value(name: str) -> Any:
    """Not the default of this setting, but valid."""
    texts = {"cors_origins": ("https://ops.example",), "trusted_proxies": ("10.0.0.0/8",), "cpu_affinity": "none"}
    texts |= {
        "hash_key": "path",
        "algorithm": "round_robin",
        "health_path": "/other",
        "control_prefix": "/lb",
        "ca_file": "ca.pem",
        "unix_socket_mode": "0660",
        "unix_socket_owner": "root",
        "redis_url": "redis://10.0.0.9:6380/1",
        "docker": "unix:///run/docker.sock",
        "dns_servers": ("10.0.0.2:53",),
    }
    texts |= dict.fromkeys(("backend_host", "backend_sni", "health_host"), "api.example")
    texts |= {"request_headers": '{ set = { X-Team = "a" } }', "response_headers": '{ remove = ["Server"] }'}
    field = Settings.model_fields[name]
    choices = [choice for part in (field.annotation, *get_args(field.annotation)) for choice in get_args(part)]
    for value in (texts.get(name), not field.default, *choices, 7, 0.25, "a-text-of-16-chars", 8192):
        with suppress(ValidationError):
            if value is not None and getattr(Settings(**{name: value}), name) not in (field.default, None):
                return value
    raise AssertionError(f"no other value is known for {name}")


def make_choice(backend_id: str) -> Choice:
    """Why an attempt went to this backend: the only candidate, with 3 requests in flight."""
    backend = Backend(backend_id, Origin("http", "127.0.0.1", 1))
    backend.active = 3
    return Choice(backend, Scene("weighted", [backend], [None], lambda rank, now: None, {"absent": "maint"}, {}))


def make_attempt(backend_id: str, outcome: str, seconds: float = 0.01, at: float = 0.0, **fields: Any) -> Attempt:
    made = Attempt(make_choice(backend_id), at)
    for name, value in {"outcome": outcome, "seconds": seconds, **fields}.items():
        setattr(made, name, value)
    return made


def make_record(backend: str | None = "a", status: int = 200, seconds: float = 0.01, **fields: Any) -> Record:
    first = {name: fields.pop(name, default) for name, default in (("method", "GET"), ("path", "/x"))}
    made = Record(fields.pop("timestamp", 1.0), **first, request_id=fields.pop("request_id", "id-1"))
    for name, value in {"backend": backend, "status": status, "seconds": seconds, **fields}.items():
        setattr(made, name, value)
    return made


@dataclass
class Clock:
    """Time in seconds that only the test moves."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Process:
    """A child process with its output in memory; always stopped by `stop`."""

    def __init__(self, arguments: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("LB_", "SERVER_"))}
        clean.pop("ALGORITHM", None)
        self.popen = subprocess.Popen(
            arguments,
            cwd=cwd,
            env=clean | {"PYTHONUNBUFFERED": "1"} | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, name="process-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        with self.popen.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def holds_hangup(self) -> bool:
        return self.has("SigBlk", signal.SIGHUP)

    def has(self, mask: str, number: signal.Signals) -> bool:
        """Whether a signal is in a mask of proc_pid_status(5); SIGHUP, which is 1, is its lowest bit."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return bool(int(re.search(rf"{mask}:\s*([0-9a-f]+)", status)[1], 16) >> number - 1 & 1)  # type: ignore[index]

    def wait(self) -> int:
        code = self.popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(PATIENCE)
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait()


@contextmanager
def running(command: Sequence[Any], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that is gone at the end of the block, however that ends."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


class Served:
    """What is asked of a balancer that listens on `url`."""

    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def is_ready(self) -> bool:
        return is_good(f"{self.url}/readyz")

    def status(self, recent: int = 20) -> Any:
        return fetch_json(f"{self.url}/status?recent={recent}")

    def backend(self, backend_id: str) -> Any:
        return next(b for b in self.status()["backend_servers"] if b["id"] == backend_id)

    def wait_healthy(self, backend_id: str, healthy: bool = True) -> None:
        wait_until(lambda: self.backend(backend_id)["healthy"] is healthy, f"{backend_id} healthy={healthy}")


class Balancer(Served):
    """A balancer in this process, on a free port, that takes the same arguments as a BalancerProcess.

    The one to use, unless a test is about the process: signals, output, exit code, CPUs, or being killed. Its health
    checks have five seconds, unless a test is about that limit: a busy machine is no finding.
    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, wait_ready: bool = True) -> None:
        given = vars(make_parser().parse_args(["--port=0", "--health-timeout=5", *arguments]))
        file = given.pop("config")
        given = {name: value for name, value in given.items() if name in Settings.model_fields}
        config, sources = settings.load(given, env or {}, file)
        self.library = LoadBalancer(config=config, sources=sources)
        if file is not None:
            configuration = self.library.configuration
            configuration.file, configuration.read = file, lambda: settings.load(given, env or {}, file)
        self.library.start()
        self.url = self.library.url
        try:
            if wait_ready:
                wait_until(self.is_ready, "balancer is ready")
        except BaseException:
            self.stop()  # no fixture has it yet, so nobody else would
            raise

    def stop(self) -> None:
        self.library.stop(timeout=0.1)

    def __enter__(self) -> Balancer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class BalancerProcess(Process, Served):
    """`load_balancer.py` on a free port. `url` is set when it listens."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, wait_ready: bool = True) -> None:
        super().__init__([PYTHON, str(ROOT / "load_balancer.py"), "--port", "0", *arguments], env)
        try:
            match = wait_until(self._listening, f"balancer listens: {arguments}")
            self.url = match.group(1)
            if wait_ready:
                wait_until(self.is_ready, "balancer is ready")
        except BaseException:
            self.stop()  # no fixture has it yet, so nobody else would
            raise

    def _listening(self) -> re.Match[str] | None:
        if self.popen.poll() is not None:
            raise AssertionError(f"the balancer ended: {self.output}")
        return re.search(r'listening on ((?:https?|http\+unix)://[^\s",]+)', self.output)


Start = Callable[..., Balancer]
StartProcess = Callable[..., BalancerProcess]


def active(balancer: Served) -> int:
    found: int = balancer.status()["statistics"]["active_requests"]
    return found


def is_idle(balancer: Served) -> bool:
    status = balancer.status()
    busy = [backend["active_connections"] for backend in status["backend_servers"]]
    return status["statistics"]["active_requests"] == 0 and not any(busy)


def failures_of(balancer: Served, backend_id: str = "only") -> int:
    count: int = balancer.backend(backend_id)["health"]["consecutive_failures"]
    return count


def newest(balancer: Served) -> dict[str, Any]:
    wait_until(lambda: active(balancer) == 0, what="no request is in flight")
    found: dict[str, Any] = balancer.status(1)["recent_requests"][0]
    return found


class BackendProcess(Process):
    """`backend_server.py` on a port of its own, for what a signal does to a backend. Else use fleet.DemoBackend."""

    def __init__(self, backend_id: str, delay: float = 0.0) -> None:
        port = free_port()
        self.id, self.url = backend_id, f"http://127.0.0.1:{port}"
        env = {"SERVER_ID": self.id, "SERVER_PORT": str(port), "RESPONSE_DELAY": str(delay)}
        super().__init__([PYTHON, str(ROOT / "backend_server.py")], env)
        try:
            wait_until(lambda: is_good(f"{self.url}/health"), f"{self.id} answers")
        except BaseException:
            self.stop()
            raise


# As somebody may set it up who has not read about it.
NGINX = """
daemon off; {main} pid nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    server {{ {server} }}
}}
"""


@contextmanager
def nginx_before(folder: Path, balancer: Served, more: str, at: str = "/", main: str = "") -> Iterator[str]:
    """Its URL. The path `at` is taken off what it passes on; `main` and `more` are lines of its configuration."""
    port = free_port()
    to = balancer.url + ("" if at == "/" else "/")
    with nginx(folder, f"listen 127.0.0.1:{port}; location {at} {{ proxy_pass {to}; {more} }}", main) as process:
        wait_until(lambda: accepts(port) or process.popen.poll() is not None, what="nginx listens")
        yield f"http://127.0.0.1:{port}"


def nginx(folder: Path, server: str, main: str = "") -> Process:
    program = shutil.which("nginx")
    assert program is not None, "apt-get install nginx-light"
    file = folder / "nginx.conf"
    file.write_text(NGINX.format(server=server, main=main), encoding="utf-8")
    return Process([program, "-p", str(folder), "-c", str(file)])


# Messages made of bytes.


@dataclass
class RawRequest:
    """A request as it came over the wire."""

    head: bytes
    body: bytes

    @property
    def target(self) -> bytes:
        return self.head.split(b" ", 2)[1]

    @property
    def lines(self) -> list[tuple[bytes, bytes]]:
        pairs = [line.partition(b":") for line in self.head.split(b"\r\n")[1:] if line]
        return [(name, value.strip()) for name, _, value in pairs]

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.lines if key.lower() == name.lower()]


def ok(body: bytes = b"ok", *lines: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


# Raw clients.


@contextmanager
def connect(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as sock:
        yield sock


def accepts(port: int) -> bool:
    with suppress(OSError), connect(port):
        return True
    return False


def exchange(port: int, data: bytes, half_close: bool = False) -> bytes:
    """Send bytes, as many as are taken; return all that comes back until the server closes."""
    with connect(port) as sock:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has answered, and reads no more
            sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    with suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


def get(target: bytes = b"/", *lines: bytes, method: bytes = b"GET", host: bytes = b"test") -> bytes:
    """A request that asks for the connection to be closed after it."""
    head = [method + b" " + target + b" HTTP/1.1", b"Host: " + host, b"Connection: close", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n"


def split_response(data: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """(status, header lines with lower-case names, body bytes as framed)."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    pairs = [line.partition(b":") for line in lines]
    return int(first.split(b" ")[1]), [(name.lower(), value.strip()) for name, _, value in pairs], body

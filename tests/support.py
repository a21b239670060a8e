"""What the tests share: real processes on free ports, a backend that says exactly the bytes it is told, raw clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from balancer.balancing.backends import Backend, Choice
from balancer.commandline import parse_arguments
from balancer.config import settings
from balancer.config.settings import Settings
from balancer.loadbalancer import LoadBalancer
from balancer.observe.record import Attempt, Record
from balancer.protocol.origin import Origin

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PAGE_TOKEN = "the-page-token-of-a-test"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until(predicate: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Poll until `predicate` is true; returns its value. Fails the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or predicate}")
        pause.wait(0.02)


def fetch(url: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """(status, headers with lower-case names, body); a dict as `body` is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content_Type", "application/json")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data=body, method=method, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, {k.lower(): v for k, v in response.headers.items()}, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def fetch_json(url: str, body: Any = None, method: str | None = None, **headers: str) -> Any:
    return json.loads(fetch(url, body, method, **headers)[2])


def options(kind: Any, **settings: Any) -> Any:
    """What a part gets of the default settings but for these."""
    return Settings(**settings).options(kind)


def another_value(name: str) -> Any:
    """Not the default of this setting, but valid."""
    texts = {"cors_origins": ("https://ops.example",), "trusted_proxies": ("10.0.0.0/8",), "cpu_affinity": "none"}
    texts |= {"algorithm": "round_robin", "health_path": "/other", "control_prefix": "/lb", "ca_file": "ca.pem"}
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
    return Choice("weighted", backend, [backend], [3], None, {"absent": "maint"})


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
        """SIGHUP is 1, the lowest bit of the mask."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return bool(int(re.search(r"SigBlk:\s*([0-9a-f]+)", status)[1], 16) & 1)  # type: ignore[index]

    def wait(self, timeout: float = 20) -> int:
        code = self.popen.wait(timeout)
        self._reader.join(5)
        return code

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        if self.popen.poll() is None:
            self.popen.kill()
        self.wait()


class Served:
    """What is asked of a balancer that listens on `url`."""

    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def is_ready(self) -> bool:
        with suppress(OSError):
            return fetch(f"{self.url}/readyz")[0] == 200
        return False

    def status(self, recent: int = 20) -> Any:
        return fetch_json(f"{self.url}/status?recent={recent}")

    def backend(self, backend_id: str) -> Any:
        return next(b for b in self.status()["backend_servers"] if b["id"] == backend_id)

    def wait_healthy(self, backend_id: str, healthy: bool = True, timeout: float = 10) -> None:
        wait_until(lambda: self.backend(backend_id)["healthy"] is healthy, timeout, f"{backend_id} healthy={healthy}")


class Balancer(Served):
    """A balancer in this process, on a free port, that takes the same arguments as a BalancerProcess.

    The one to use, unless a test is about the process: signals, output, exit code, CPUs, or being killed.
    """

    def __init__(self, *arguments: str, env: dict[str, str] | None = None, wait_ready: bool = True) -> None:
        given = vars(parse_arguments(["--port=0", *arguments]))
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
                wait_until(self.is_ready, 30, "balancer is ready")
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
            match = wait_until(self._listening, 30, f"balancer listens: {arguments}")
            self.url = match.group(1)
            if wait_ready:
                wait_until(self.is_ready, 30, "balancer is ready")
        except BaseException:
            self.stop()  # no fixture has it yet, so nobody else would
            raise

    def _listening(self) -> re.Match[str] | None:
        if self.popen.poll() is not None:
            raise AssertionError(f"the balancer ended: {self.output}")
        return re.search(r"listening on (\S+?),?(?:\s|$)", self.output)


def active(balancer: Served) -> int:
    found: int = balancer.status()["statistics"]["active_requests"]
    return found


def newest(balancer: Served) -> dict[str, Any]:
    wait_until(lambda: active(balancer) == 0, what="no request is in flight")
    found: dict[str, Any] = balancer.status(1)["recent_requests"][0]
    return found


@dataclass
class DemoBackend:
    """`backend_server.py` on a port of its own; can be killed and started again."""

    id: str
    delay: float = 0.0
    port: int = field(default_factory=free_port)
    process: Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        env = {"SERVER_ID": self.id, "SERVER_PORT": str(self.port), "RESPONSE_DELAY": str(self.delay)}
        self.process = Process([PYTHON, str(ROOT / "backend_server.py")], env)
        wait_until(self.is_up, 30, f"{self.id} answers")

    def is_up(self) -> bool:
        with suppress(OSError):
            return fetch(f"{self.url}/health")[0] == 200
        return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.popen.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()


@dataclass
class Demo:
    """A balancer in front of three demo backends with weights 3, 2, 1, as `start_all` starts them."""

    balancer: BalancerProcess
    backends: list[DemoBackend]

    @property
    def url(self) -> str:
        return self.balancer.url

    def stop(self) -> None:
        self.balancer.stop()
        for backend in self.backends:
            backend.stop()


def start_demo(*arguments: str, delays: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Demo:
    backends = [DemoBackend(f"backend_{number}", delay) for number, delay in enumerate(delays, start=1)]
    try:
        starters = [threading.Thread(target=backend.start) for backend in backends]
        for thread in starters:
            thread.start()
        for thread in starters:
            thread.join()
        flags = [f"--backend={backend.id}={backend.url}@{4 - n}" for n, backend in enumerate(backends, start=1)]
        env = {"LB_PAGE_TOKEN": PAGE_TOKEN}
        balancer = BalancerProcess(*flags, "--expose-backend", *arguments, env=env)
    except BaseException:
        for backend in backends:
            backend.stop()
        raise
    return Demo(balancer, backends)


# A backend made of bytes.

Script = Callable[[socket.socket, "RawRequest"], None]


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


class ScriptedBackend:
    """Accepts connections and answers each request by `script`; closes when the script returns "after answering".

    Health checks (`GET /health`) are answered 200 unless `is_healthy` is False. `requests` holds everything else that
    came, `connections` counts those that carried it.
    """

    def __init__(self) -> None:
        self.script: Script = lambda sock, request: sock.sendall(ok())
        self.is_healthy = True
        self.requests: list[RawRequest] = []
        self.connections = 0
        self.open: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, name="scripted-backend", daemon=True)
        self._thread.start()

    def answer(self, data: bytes, close: bool = False) -> None:
        """Answer every request with these bytes."""

        def script(sock: socket.socket, request: RawRequest) -> None:
            sock.sendall(data)
            if close:
                sock.shutdown(socket.SHUT_RDWR)

        self.script = script

    def reset(self) -> None:
        self.requests.clear()
        self.connections = 0
        self.is_healthy = True
        self.answer(ok())

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which close alone does not
        self.listener.close()
        for sock in list(self.open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self.open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="scripted-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        used = False
        try:
            with sock, suppress(OSError):
                stream = sock.makefile("rb")
                while (request := read_request(stream)) is not None:
                    if request.target == b"/health":
                        status = b"200 OK" if self.is_healthy else b"500 Internal Server Error"
                        sock.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
                        continue
                    self.requests.append(request)
                    if not used:
                        used, self.connections = True, self.connections + 1
                    self.script(sock, request)
        finally:
            self.open.discard(sock)


def read_request(stream: Any) -> RawRequest | None:
    """One request with its body, chunked or by length; None at EOF."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return None
        head += line
    request = RawRequest(head, b"")
    if request.values(b"transfer-encoding"):
        request.body = read_chunked(stream)
    elif length := request.values(b"content-length"):
        request.body = stream.read(int(length[0]))
    return request


def read_chunked(stream: Any) -> bytes:
    body = b""
    while True:
        size = int(stream.readline().partition(b";")[0] or b"0", 16)
        body += stream.read(size)
        stream.readline()
        if not size:
            return body


# Raw clients.


@contextmanager
def connect(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        yield sock


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

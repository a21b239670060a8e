"""A balancer as far as test_client.py can see, that behaves as each test wants, and ways to run that program."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support import ROOT, running, wait_until

SCRIPT = ROOT / "test_client.py"
LIMIT = 120  # seconds until a run counts as hanging
Json = dict[str, Any]


class StubBalancer(ThreadingHTTPServer):
    """A balancer as far as the client can see; the attributes say how it behaves."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.lock = threading.Lock()
        self.turn = 0
        self.total = 0
        self.failed = 0
        self.seen: list[tuple[str, str, bytes]] = []
        self.headers: list[list[tuple[str, str]]] = []
        self.connections = 0
        self.algorithm = "round_robin"
        self.switches: list[str] = []
        self.faults: list[tuple[str, str, Json]] = []
        self.cycle = ["b1", "b2", "b3"]  # who answers, in turn
        self.expected: dict[str, float | None] = {"b1": 1 / 3, "b2": 1 / 3, "b3": 1 / 3}
        self.down: set[str] = set()
        self.reasons: dict[str, str] = {}  # why they are in the state they are in
        self.fail_every = 0  # each n-th answer is a 500
        self.delay = 0.0
        self.release = threading.Event()  # ends every delay
        self.close_after_answer = False
        self.truncate = False
        self.trickle = False
        self.name_by = "body"  # or "header", "nothing"
        self.is_balancer = True
        self.count_share = 1.0
        self.refuse_switch: tuple[int, Json] | None = None
        self.token: str | None = None
        self.weights: dict[str, int] = {}
        self.fail_first = 0  # so many answers are a 500
        self.stall_at, self.stall = 0, 0.0  # the n-th answer takes so many seconds
        self.sticky = False  # a cookie keeps a client at its backend
        self.arrivals: list[tuple[float, Any]] = []  # time and peer of each proxied request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of these tests."""

    def next_turn(self) -> tuple[int, str]:
        with self.lock:
            self.turn += 1
            return self.turn, self.cycle[(self.turn - 1) % len(self.cycle)]

    def count(self, failed: bool) -> None:
        with self.lock:
            self.total += 1
            self.failed += failed

    def status(self) -> Json:
        total = int(self.total * self.count_share)
        backends = [
            {
                "id": name,
                "healthy": name not in self.down,
                "health": {"reason": self.reasons.get(name)},
                "weight": self.weights.get(name, 1),
                "expected_share": share,
                "unknown": [None],
            }
            for name, share in self.expected.items()
        ]
        good = total - self.failed
        counters = {"total_requests": total, "successful_requests": good, "failed_requests": self.failed}
        return {"algorithm": self.algorithm, "statistics": counters, "backend_servers": backends, "recent_requests": []}


class StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: StubBalancer

    def log_message(self, *_arguments: Any) -> None:
        pass

    def answer(self, code: int, document: Json, headers: Json | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + (10 if self.server.truncate and self.is_proxied else 0)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.trickle and self.is_proxied:
            self.send_slowly(body)
        else:
            self.wfile.write(body)

    def send_slowly(self, body: bytes) -> None:
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.release.wait(0.1):
                break

    @property
    def is_proxied(self) -> bool:
        return self.path.startswith("/api/") or self.path.startswith("/own")

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.server.is_balancer:
            self.answer(404, {"error": "not found"})
        elif self.is_proxied:
            self.proxied(body)
        elif self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, {"error": "token required"})
        elif self.path.endswith("/faults"):
            self.server.faults.append((self.command, self.path.split("/")[2], json.loads(body)))
            self.answer(200, {})
        elif self.path == "/algorithm":
            self.switch(json.loads(body) if body else None)
        else:
            self.answer(200, {"status": "healthy"} if self.path == "/health" else self.server.status())

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def switch(self, wanted: Json | None) -> None:
        if wanted is None:
            names = ("round_robin", "weighted", "least_connections")
            self.answer(200, {"current": self.server.algorithm, "algorithms": [{"name": name} for name in names]})
            return
        if self.server.refuse_switch:
            self.answer(*self.server.refuse_switch)
            return
        self.server.algorithm = wanted["algorithm"]
        self.server.switches.append(wanted["algorithm"])
        self.answer(200, {"message": "ok", "current": wanted["algorithm"]})

    def proxied(self, body: bytes) -> None:
        stub = self.server
        stub.seen.append((self.command, self.path, body))
        stub.headers.append(list(self.headers.items()))
        stub.arrivals.append((time.monotonic(), self.client_address))
        turn, name = stub.next_turn()
        if stub.sticky and (cookie := self.headers.get("Cookie")):
            name = cookie.partition("=")[2].partition(".")[0]
        if turn == stub.stall_at:
            stub.release.wait(stub.stall)
        if stub.delay:
            stub.release.wait(stub.delay)
        failed = turn <= stub.fail_first or bool(stub.fail_every and turn % stub.fail_every == 0)
        document = {"message": "ok"} | ({"server_id": name} if stub.name_by == "body" else {})
        stub.count(failed)
        headers = {"X-Request-ID": f"request-{turn}"}
        if stub.name_by == "header":
            headers["X-Served-By"] = name
        if stub.sticky and "Cookie" not in self.headers:
            headers["Set-Cookie"] = f"lb={name}.{self.headers['X-Forwarded-For']}; Path=/; HttpOnly"
        self.answer(500 if failed else 200, document, headers)
        if stub.close_after_answer or stub.truncate:
            self.close_connection = True  # without saying so: what a kept connection may always meet


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LB_URL", "LB_PORT", "NO_COLOR")}
    return {**kept, "PYTHONIOENCODING": "utf-8", **(extra or {})}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT, env=environment(env), check=False
    )


def run_json(*arguments: str) -> tuple[int, Json]:
    result = run("--json", *arguments)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    return result.returncode, json.loads(result.stdout)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), *arguments]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        yield process


def interrupted(*arguments: str, when: Callable[[], bool], number: int = signal.SIGINT) -> tuple[int, str, str]:
    """(exit code, output, errors) of a run that is signalled then."""
    with started(*arguments) as process:
        wait_until(when)
        process.send_signal(number)
        out, errors = process.communicate(timeout=LIMIT)
        return process.returncode, out, errors


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.stdout == ""
    assert result.stderr.startswith("test_client.py: ")
    assert result.stderr.count("\n") == 1
    return result.stderr

"""A stand-in for the balancer: it serves a canned /status to the dashboard and remembers what it was sent."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Json = dict[str, Any]
STARTED = time.time() - 750
PAGE = Path(__file__).parent.parent / "dashboard.html"
ALGORITHMS = ("round_robin", "weighted", "least_connections", "least_response_time")
CODES = {"1xx": 0, "2xx": 0, "3xx": 0, "4xx": 0, "5xx": 0}


def backend(index: int = 1, **changes: Any) -> Json:
    """One healthy backend as /status lists it; keyword arguments replace fields."""
    now = time.time()
    entry: Json = {
        "id": f"backend_{index}", "url": f"http://127.0.0.1:{5000 + index}", "healthy": True, "active_connections": 1,
        "weight": 1, "total_requests": 100 * index, "successful_requests": 100 * index, "failed_requests": 0,
        "aborted_requests": 0, "avg_response_time": 0.05, "state": "up", "admin_state": "ready",
        "max_connections": None, "latency": {"p50": 0.0041, "p95": 0.062, "p99": 0.12}, "codes": CODES,
        "expected_share": None,
        "health": {
            "status": "up", "reason": None, "since": now - 250, "fall": 2, "rise": 1, "consecutive_failures": 0,
            "consecutive_successes": 9, "last_check": {"at": now - 4, "duration": 0.003, "status": 200, "error": None},
        },
    }  # fmt: skip
    return entry | changes


def down_backend(index: int = 1, reason: str = "refused", **changes: Any) -> Json:
    """A backend that its health check found dead."""
    now = time.time()
    health = {
        "status": "down", "reason": reason, "since": now - 7, "fall": 2, "rise": 1, "consecutive_failures": 5,
        "consecutive_successes": 0, "last_check": {"at": now - 1, "duration": 0.001, "status": None, "error": None},
    }  # fmt: skip
    return backend(index, **{"healthy": False, "state": "down", "active_connections": 0, "health": health} | changes)


def recent(index: int, **changes: Any) -> Json:
    """One line of the list of recent requests."""
    entry: Json = {
        "timestamp": time.time() - index, "server_id": "backend_1", "response_time": 0.012, "status": 200,
        "method": "GET", "path": "/api/process", "request_id": f"request-{index}", "attempts": 1, "reason": None,
    }  # fmt: skip
    return entry | changes


def status(backends: list[Json], failed: int = 0, **changes: Any) -> Json:
    """A whole /status answer whose totals agree with its backends; no expected shares means equal ones."""
    now = time.time()
    total = sum(entry["total_requests"] for entry in backends)
    for entry in backends:
        if entry["expected_share"] is None and entry["healthy"]:
            entry["expected_share"] = 1 / len(backends)
    answer: Json = {
        "schema_version": 1, "version": "0.1.0", "load_balancer_id": "lb-1", "algorithm": "weighted",
        "lifecycle": "running", "now": now, "uptime": 754.0, "events_seq": 17,
        "statistics": {
            "total_requests": total, "successful_requests": total - failed, "failed_requests": failed,
            "start_time": STARTED, "active_requests": sum(entry["active_connections"] for entry in backends),
            "queued_requests": 0, "aborted_requests": 0, "retries": 0, "unassigned_requests": 0,
            "requests_per_second": 42.5 if total else 0.0, "codes": CODES,
            "latency": {"p50": 0.0052, "p95": 0.064, "p99": 1.27} if total else {"p50": None, "p95": None, "p99": None},
        },
        "backend_servers": backends,
        "recent_requests": [recent(index) for index in range(5)] if total else [],
        "capabilities": {
            "writes": True, "token_required": False,
            "algorithms": [{"name": name, "description": f"About {name}."} for name in ALGORITHMS],
        },
    }  # fmt: skip
    return answer | changes


@dataclass
class Stub:
    """What the server answers (change it at any time) and what it was asked."""

    answer: Json
    port: int = 0
    cors: bool = True
    traffic_cors: bool = True
    count_traffic: bool = False
    status_code: int = 200
    raw_body: bytes | None = None
    token: str | None = None
    refuse_writes: bool = False
    traffic_code: int = 200
    gate: threading.Event = field(default_factory=threading.Event)
    traffic_gate: threading.Event = field(default_factory=threading.Event)
    writes: list[tuple[str, Json]] = field(default_factory=list)
    polls: int = 0
    traffic: int = 0
    running: dict[str, int] = field(default_factory=lambda: {"poll": 0, "traffic": 0})
    most_at_once: dict[str, int] = field(default_factory=lambda: {"poll": 0, "traffic": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)
    server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen: on a free port the first time, on the same one after a stop."""
        handler = type("Handler", (StubHandler,), {"stub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        with self.lock:
            self.polls += kind == "poll"
            self.running[kind] += 1
            self.most_at_once[kind] = max(self.most_at_once[kind], self.running[kind])
        try:
            yield
        finally:
            with self.lock:
                self.running[kind] -= 1

    def next_backend(self) -> str:
        """The backend that answers the next test request, in turn."""
        with self.lock:
            self.traffic += 1
            backends = self.answer["backend_servers"]
            chosen: Json = backends[self.traffic % len(backends)]
            chosen["total_requests"] += self.count_traffic
            return str(chosen["id"])


class StubHandler(BaseHTTPRequestHandler):
    """HTTP/1.0, so that a stopped server leaves no connection behind."""

    stub: Stub

    def do_GET(self) -> None:
        if self.path == "/status":
            with self.stub.counted("poll"):
                self.send_status()
        elif self.path.startswith("/api/"):
            with self.stub.counted("traffic"):
                self.stub.traffic_gate.wait(20)
                self.reply(self.stub.traffic_code, {"server_id": self.stub.next_backend()})
        elif self.path.partition("?")[0] == "/dashboard":
            self.send_dashboard()
        else:
            self.reply(404, {"error": "not found"})

    def send_status(self) -> None:
        self.stub.gate.wait(20)
        if self.stub.token and self.headers["Authorization"] != f"Bearer {self.stub.token}":
            self.reply(401, {"error": "a token is required"})
        else:
            self.reply(self.stub.status_code, self.stub.answer)

    def send_dashboard(self) -> None:
        """The page under the strict policy that the balancer gives it."""
        body = PAGE.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", strict_policy(body.decode()))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.stub.refuse_writes:
            self.reply(403, {"error": "changes are off"})
            return
        self.stub.writes.append((self.path, body))
        if self.path == "/algorithm":
            self.stub.answer["algorithm"] = body["algorithm"]
            self.reply(200, {"message": f"Algorithm is now {body['algorithm']}", "current": body["algorithm"]})
        else:
            self.reply(200, {"message": "Statistics reset"})

    def do_OPTIONS(self) -> None:
        self.send_response(204)
        self.send_cors()
        self.send_header("Access-Control-Allow-Headers", "content-type, authorization")
        self.send_header("Access-Control-Allow-Methods", "GET, POST, PATCH, DELETE")
        self.end_headers()

    def reply(self, code: int, answer: Json) -> None:
        body = json.dumps(answer).encode() if self.stub.raw_body is None else self.stub.raw_body
        self.send_response(code)
        self.send_cors()
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_cors(self) -> None:
        readable = self.stub.traffic_cors or not self.path.startswith("/api/")
        if self.stub.cors and readable:
            self.send_header("Access-Control-Allow-Origin", "null")

    def log_message(self, format: str, *args: Any) -> None:
        """Tests read what was asked from the stub, not from stderr."""


def strict_policy(page: str) -> str:
    """Nothing but the page's own style and script, named by their hashes."""

    def hashed(tag: str) -> str:
        found = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(it.encode()).digest()).decode()}'" for it in found)

    sources = f"script-src {hashed('script')}; style-src {hashed('style')}"
    return f"default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'; {sources}"


@contextmanager
def serving(answer: Json) -> Iterator[Stub]:
    """A running stub on a free port, gone at the end whatever happened."""
    stub = Stub(answer)
    stub.gate.set()
    stub.traffic_gate.set()
    stub.start()
    try:
        yield stub
    finally:
        stub.gate.set()
        stub.traffic_gate.set()
        stub.stop()

"""A stand-in for the balancer: it serves canned answers to the dashboard and remembers what it was sent."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support import PAGE_TOKEN

from balancer.control.revisions import Revisions

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
        "expected_share": None, "drained": False, "admission": 1.0, "source": "file", "overrides": {},
        "ejection": {"status": "none", "consecutive_failures": 0, "count": 0, "until": None, "reason": None},
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
        "queued": 0.0, "first_byte": 0.011, "bytes_in": 0, "bytes_out": 1834, "complete": True,
        "tried": [{"backend": "backend_1", "outcome": "200", "error": None, "seconds": 0.011, "connect": None}],
    }  # fmt: skip
    return entry | changes


def explained(request_id: str) -> Json:
    """What /requests/<id> tells of a request that was retried."""
    second = {"id": "backend_2", "active": 3, "score": 1.5}
    attempt = {"algorithm": "least_connections", "error": None, "seconds": 0.002, "connect": 0.0003}
    refused = attempt | {
        "backend": "backend_1", "outcome": "connect", "error": "connection refused", "connect": None,
        "candidates": [{"id": "backend_1", "active": 2, "score": 0.667}, second],
        "excluded": {"backend_3": "down"},
    }  # fmt: skip
    answered = attempt | {
        "backend": "backend_2", "outcome": "200", "candidates": [second],
        "excluded": {"backend_1": "already tried", "backend_3": "down"},
    }  # fmt: skip
    changes = {"request_id": request_id, "server_id": "backend_2", "attempts": 2, "tried": [refused, answered]}
    return recent(1, **changes)


def event(seq: int, kind: str, backend_id: str | None = None, severity: str = "info", **changes: Any) -> Json:
    """One entry of /events, as old as its number is small."""
    entry: Json = {
        "seq": seq, "timestamp": time.time() - 60 + seq, "kind": kind, "backend": backend_id,
        "message": f"about {kind}", "severity": severity, "count": 1,
    }  # fmt: skip
    return entry | changes


def history(ids: list[str], step: int = 1, count: int = 60, failing: int = 0, now: float | None = None) -> list[Json]:
    """`count` slots up to now, with a gentle wave of traffic; `failing` of the newest have failures."""
    newest = int((now or time.time()) // step * step) - step
    points = []
    for index in range(count):
        at = newest - (count - 1 - index) * step
        wave = 1 + 0.3 * math.sin(at / 17) + 0.1 * math.sin(at / 3.1)
        backends = {}
        for number, backend_id in enumerate(ids):
            requests = round(step * wave * 30 / (number + 1))
            backends[backend_id] = {
                "requests": requests, "failed": 0, "in_flight": 1 + (at + number) % 3,
                "p50": 0.004, "p95": 0.05, "p99": 0.1,
            }  # fmt: skip
        point = {
            "at": at, "requests": sum(one["requests"] for one in backends.values()), "retries": 0, "waiting": 0,
            "failed": 4 * step if index >= count - failing else 0, "backends": backends,
            "in_flight": sum(one["in_flight"] for one in backends.values()),
            "p50": 0.005 * wave, "p95": 0.04 + 0.02 * wave, "p99": 0.06 + 0.05 * wave * wave,
        }  # fmt: skip
        points.append(point)
    return points


def status(backends: list[Json], failed: int = 0, **changes: Any) -> Json:
    """A whole /status answer whose totals agree with its backends; no expected shares means equal ones."""
    now = time.time()
    total = sum(entry["total_requests"] for entry in backends)
    for entry in backends:
        if entry["expected_share"] is None and entry["healthy"]:
            entry["expected_share"] = 1 / len(backends)
    answer: Json = {
        "schema_version": 1, "version": "0.1.0", "load_balancer_id": "lb-1", "algorithm": "weighted",
        "lifecycle": "running", "now": now, "uptime": 754.0, "events_seq": 0, "panic": False,
        "config": {"file": None, "loaded_at": STARTED, "last_error": None},
        "statistics": {
            "total_requests": total, "successful_requests": total - failed, "failed_requests": failed,
            "start_time": STARTED, "active_requests": sum(entry["active_connections"] for entry in backends),
            "queued_requests": 0, "waiting_requests": 0, "aborted_requests": 0, "retries": 0, "unassigned_requests": 0,
            "requests_per_second": 42.5 if total else 0.0, "codes": CODES,
            "latency": {"p50": 0.0052, "p95": 0.064, "p99": 1.27} if total else {"p50": None, "p95": None, "p99": None},
        },
        "backend_servers": backends,
        "recent_requests": [recent(index) for index in range(5)] if total else [],
        "capabilities": {
            "writes": True, "token_required": False, "reload": True, "traffic": True,
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
    token: str | None = None  # every read and write needs it
    page_token: str | None = PAGE_TOKEN  # Origin: null needs it, and so do the writes of every page
    refuse_writes: bool = False
    failing_writes: set[str] = field(default_factory=set)  # paths that answer 422
    events: list[Json] = field(default_factory=list)
    history: dict[int, list[Json]] | None = field(default_factory=dict)  # by step; None is a balancer that keeps none
    cluster: Json = field(default_factory=dict)
    requests: dict[str, Json] = field(default_factory=dict)
    reload_answer: Json = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)  # targets of all GETs
    traffic_code: int = 200
    gate: threading.Event = field(default_factory=threading.Event)
    traffic_gate: threading.Event = field(default_factory=threading.Event)
    writes: list[tuple[str, Json]] = field(default_factory=list)  # (path of a POST or METHOD path, body)
    polls: int = 0
    traffic: int = 0
    running: dict[str, int] = field(default_factory=lambda: {"poll": 0, "traffic": 0})
    most_at_once: dict[str, int] = field(default_factory=lambda: {"poll": 0, "traffic": 0})
    revisions: Revisions = field(default_factory=Revisions)
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

    def tell(self, *entries: Json) -> None:
        """Add events, and announce them in /status."""
        self.events.extend(entries)
        self.answer["events_seq"] = max(entry["seq"] for entry in self.events)

    def find(self, backend_id: str) -> Json | None:
        return next((one for one in self.answer["backend_servers"] if one["id"] == backend_id), None)

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
        self.stub.asked.append(self.path)
        target = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(target.query).items()}
        if target.path == "/status":
            with self.stub.counted("poll"):
                self.send_status(query)
        elif target.path.startswith("/api/"):
            with self.stub.counted("traffic"):
                self.stub.traffic_gate.wait(60)
                self.reply(self.stub.traffic_code, {"server_id": self.stub.next_backend()})
        elif target.path in ("/dashboard", "/elsewhere.html"):
            self.send_dashboard()
        elif target.path == "/events":
            newer = [one for one in self.stub.events if one["seq"] > int(query["since"])]
            self.reply(200, {"events": newer, "latest": self.stub.answer["events_seq"]})
        elif target.path == "/history" and self.stub.history is not None:
            step, since = int(query["step"]), int(query["since"])
            newer = [one for one in self.stub.history.get(step, []) if one["at"] > since]
            self.reply(200, {"step": step, "now": time.time(), "points": newer})
        elif target.path == "/cluster":
            self.reply(200, self.stub.cluster)
        elif target.path == "/config":
            rows = [{"name": "algorithm", "value": "weighted", "source": "file", "needs_restart": False}]
            self.reply(200, {"settings": rows})
        elif target.path.removeprefix("/requests/") in self.stub.requests:
            self.reply(200, self.stub.requests[target.path.removeprefix("/requests/")])
        else:
            self.reply(404, {"error": "not found"})

    def send_status(self, query: dict[str, str]) -> None:
        self.stub.gate.wait(60)
        if self.lacks_token(is_write=False):
            self.reply(401, {"error": "a token is required"})
        else:
            required = bool(self.stub.token or self.stub.page_token)
            told = {"token_required": required, "authorized": self.is_authorized()}
            answer = self.stub.answer
            if isinstance(answer.get("capabilities"), dict):
                answer = answer | {"capabilities": answer["capabilities"] | told}
            backends = answer.get("backend_servers")
            if "since" in query and backends and all("id" in one for one in backends):
                revision, changed = self.stub.revisions.since(int(query["since"]), copy.deepcopy(backends))
                whole = backends if changed is None else []
                answer = answer | {"backend_servers": whole, "revision": revision, "changed_backends": changed}
            self.reply(self.stub.status_code, answer)

    def is_authorized(self) -> bool:
        known = [f"Bearer {token}" for token in (self.stub.token, self.stub.page_token) if token]
        return self.headers["Authorization"] in known

    def lacks_token(self, is_write: bool) -> bool:
        from_page = self.headers["Origin"] == "null" or (is_write and self.headers["Origin"])
        needed = self.stub.token or (self.stub.page_token and from_page)
        is_wrong = self.headers["Authorization"] is not None
        return bool(needed or is_wrong) and not self.is_authorized()

    def send_dashboard(self) -> None:
        """The page under the strict policy that the balancer gives it."""
        body = PAGE.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        if self.path.startswith("/dashboard"):  # elsewhere it is a copy on a web server of somebody's own
            self.send_header("Content-Security-Policy", strict_policy(body.decode()))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.take_write(self.path)
        if body is None:
            return
        if self.path == "/algorithm":
            self.stub.answer["algorithm"] = body["algorithm"]
            self.reply(200, {"message": f"Algorithm is now {body['algorithm']}", "current": body["algorithm"]})
        elif self.path.startswith("/reload"):
            self.reply(200, self.stub.reload_answer | {"applied": "dry_run" not in self.path})
        elif self.path == "/backends":
            added = backend(4, **{"id": "backend_4"} | body)
            self.stub.answer["backend_servers"].append(added)
            self.reply(201, added)
        else:
            self.reply(200, {"message": "Statistics reset"})

    def do_PATCH(self) -> None:
        body = self.take_write(f"PATCH {self.path}")
        found = self.stub.find(self.path.removeprefix("/backends/"))
        if body is None or found is None:
            return
        found |= body
        if "admin_state" in body:
            found["state"] = {"ready": "up"}.get(body["admin_state"], body["admin_state"])
        self.reply(200, found)

    def do_DELETE(self) -> None:
        if self.take_write(f"DELETE {self.path}") is None:
            return
        name = self.path.removeprefix("/backends/")
        self.stub.answer["backend_servers"] = [one for one in self.stub.answer["backend_servers"] if one["id"] != name]
        self.reply(200, {"message": f"{name} removed", "active": 0})

    def take_write(self, name: str) -> Json | None:
        """The body of a change that is let through; None if it was answered with a refusal."""
        body: Json = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.stub.refuse_writes:
            self.reply(403, {"error": "changes are off"})
        elif self.lacks_token(is_write=True):
            self.reply(401, {"error": "a token is required"})
        elif self.path in self.stub.failing_writes:
            self.reply(422, {"error": "that value is wrong"})
        else:
            self.stub.writes.append((name, body))
            return body
        return None

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
        with suppress(ConnectionError):  # a page that has stopped waiting
            self.end_headers()
            self.wfile.write(body)

    def send_cors(self) -> None:
        if self.path.startswith("/api/"):
            readable = self.stub.traffic_cors
        else:
            readable = self.command == "OPTIONS" or not self.lacks_token(is_write=False)
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

"""The control API on real connections: its paths, the dashboard, bodies, a port of its own."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import pytest
from control import ALLOWED, STATUS, TOKEN, assert_error, assert_shape
from flask import Flask
from flask.testing import FlaskClient
from fleet import Demo
from jsonschema import Draft202012Validator
from support import (
    ROOT,
    Balancer,
    BalancerProcess,
    connect,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    ok,
    read_all,
    wait_until,
)
from wire import WireBackend, post, read_response


class InlineParts(HTMLParser):
    """What a Content-Security-Policy decides about."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag if tag in self.texts else ""
        if self._inside:
            self.texts[tag].append("")
        self.attributes += [name for name, _ in attrs if name == "style" or name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_the_dashboard_is_the_file_and_its_policy_lets_exactly_its_own_parts_run(client: FlaskClient) -> None:
    answer = client.get("/dashboard")
    page = (ROOT / "dashboard.html").read_bytes()
    assert answer.status_code == 200 and answer.mimetype == "text/html" and answer.data == page
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "noopener-allow-popups"
    firefox = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"}
    assert client.get("/dashboard", headers=firefox).headers["Cross-Origin-Opener-Policy"] == "same-origin"
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["img-src"] == "data:"
    parts = InlineParts(page.decode())
    for kind in ("script", "style"):
        hashes = {base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in parts.texts[kind]}
        assert set(policy[f"{kind}-src"].split()) == {f"'sha256-{value}'" for value in hashes}
    assert parts.attributes == []  # inline handlers and styles would be blocked


def test_a_missing_dashboard_is_said_to_be_missing(app: Flask, client: FlaskClient) -> None:
    app.extensions["control"].dashboard = ROOT / "nothing.html"
    assert_error(client.get("/dashboard"), 404, "dashboard.html")


@pytest.fixture(scope="module")
def guarded() -> Iterator[BalancerProcess]:
    """A balancer with a token that logs all it can."""
    env = {"LB_ADMIN_TOKEN": TOKEN, "LB_CORS_ORIGINS": ALLOWED}
    with BalancerProcess(f"--backend=b=http://127.0.0.1:{free_port()}", "--log-level=debug", env=env) as balancer:
        yield balancer


def test_the_token_is_in_no_answer_and_in_no_log(guarded: BalancerProcess) -> None:
    tokens = [None, "wrong", TOKEN]
    seen: list[str] = []
    for token in tokens:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        for path, body in (("/algorithm", {"algorithm": "round_robin"}), ("/reset", {}), ("/backends", {"url": "x"})):
            status, lines, data = fetch(guarded.url + path, body, **headers)
            assert (status == 401) is (token != TOKEN)
            seen.append(f"{lines} {data!r}")
    for path in ("/status", "/events", "/openapi.json", "/dashboard", "/backends", "/algorithm", "/nothing-here"):
        _, lines, data = fetch(guarded.url + path, **{"Authorization": f"Bearer {TOKEN}"})
        seen.append(f"{lines} {data!r}")
    assert TOKEN not in "".join(seen)
    assert TOKEN not in guarded.output
    refused = [e for e in fetch_json(f"{guarded.url}/events")["events"] if e["kind"] == "write_refused"]
    assert sum(e["count"] for e in refused) == 6


def test_bad_bodies_on_a_real_connection(guarded: BalancerProcess) -> None:
    """The rest of a refused body must not be taken for the next request, and nothing must show a traceback."""
    head = (b"Content-Type: application/json", b"Authorization: Bearer " + TOKEN.encode())
    for body in (b"{", b"\xff\xfe", b"[" * 60000, b"", b"[]", b'{"algorithm": NaN}', b"x" * 100_000, b"x" * 3_000_000):
        asked = post(*head, b"Content-Length: %d" % len(body), body=body, target=b"/algorithm")
        answers = io.BytesIO(exchange(guarded.port, asked + get(b"/health")))
        status, lines, data = read_response(answers)
        assert 400 <= status < 500
        assert json.loads(data)["error"]
        assert b"json" in dict(lines)[b"content-type"]
        following = answers.read()  # nothing if the connection was closed after the refusal
        assert not following or following.startswith(b"HTTP/1.1 200 ")
        assert fetch(f"{guarded.url}/health")[0] == 200
    assert "Traceback" not in guarded.output


def test_a_refused_body_is_read_to_its_end(guarded: BalancerProcess) -> None:
    """RFC 9112 section 9.6: to close on a client that still sends might cost it the answer."""
    for _ in range(5):
        with connect(guarded.port) as sock:
            sock.sendall(post(b"Content-Type: application/json", b"Content-Length: 3000000", target=b"/algorithm"))
            assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")  # no token
            sock.sendall(b"x" * 3_000_000)
            sock.sendall(get(b"/health"))
            assert read_all(sock).startswith(b"HTTP/1.1 200 ")


def test_the_whole_api_on_a_real_process(demo: Demo, document: dict[str, Any]) -> None:
    base = demo.url
    status = fetch_json(f"{base}/status?recent=5")
    Draft202012Validator({"components": document["components"], "$ref": "#/components/schemas/Status"}).validate(status)
    assert_shape({**status, "recent_requests": [None]}, {**STATUS, "recent_requests": [type(None)]})
    assert all(backend["healthy"] for backend in status["backend_servers"])
    assert status["lifecycle"] == "running" and abs(status["now"] - time.time()) < 60
    assert fetch_json(f"{base}/health")["status"] == "healthy"
    assert fetch(f"{base}/dashboard")[2] == (ROOT / "dashboard.html").read_bytes()
    described = fetch_json(f"{base}/openapi.json")
    assert described.pop("security") == [{"bearer": []}, {}]  # the demo has a page token
    assert described["components"].pop("securitySchemes") and described == document

    assert fetch(f"{base}/api/process")[0] == 200
    assert fetch_json(f"{base}/status")["recent_requests"][0]["path"] == "/api/\u2026"
    assert fetch(f"{base}/reset", method="POST")[0] == 200  # as curl -X POST sends it
    assert fetch_json(f"{base}/status")["statistics"]["total_requests"] == 0

    extra = {"id": "extra", "url": demo.backends[0].url}
    assert fetch(f"{base}/backends", extra)[0] == 201
    demo.balancer.wait_healthy("extra")
    assert fetch_json(f"{base}/backends/extra", {"weight": 9}, "PATCH")["weight"] == 9
    assert fetch(f"{base}/backends/extra", method="DELETE")[0] in (200, 202)
    wait_until(lambda: fetch(f"{base}/backends/extra")[0] == 404)
    kinds = [event["kind"] for event in fetch_json(f"{base}/events")["events"]]
    for kind in ("backend_up", "statistics_reset", "backend_added", "backend_changed", "backend_removed"):
        assert kind in kinds


def test_head_and_keep_alive_on_control_paths(guarded: BalancerProcess) -> None:
    for path in ("/status", "/health", "/dashboard", "/openapi.json"):
        status, lines, body = fetch(guarded.url + path, method="HEAD")
        assert (status, body) == (200, b"") and int(lines["content-length"]) > 0


@pytest.fixture(scope="module")
def own_paths() -> Iterator[WireBackend]:
    """A backend whose own paths have the names of control paths."""
    with WireBackend() as backend:
        backend.script = lambda sock, request: sock.sendall(ok(b"backend " + request.target))
        yield backend


CONTROL_PATHS = ["/status", "/algorithm", "/reset", "/backends", "/backends/b", "/events", "/dashboard", "/readyz"]


def assert_forwarded(url: str) -> None:
    wait_until(lambda: fetch(f"{url}/anything")[0] == 200, what="the backend is up")
    for path in CONTROL_PATHS:
        assert fetch(url + path)[2] == b"backend " + path.encode()
    assert fetch(f"{url}/algorithm", {"algorithm": "round_robin"})[2] == b"backend /algorithm"


def test_with_a_prefix_the_bare_paths_belong_to_the_backend(own_paths: WireBackend) -> None:
    with Balancer(f"--backend=b={own_paths.url}", "--control-prefix=/lb", wait_ready=False) as balancer:
        assert_forwarded(balancer.url)
        control = f"{balancer.url}/lb"
        assert fetch_json(f"{control}/status")["statistics"]["total_requests"] > 0
        assert fetch_json(f"{control}/algorithm", {"algorithm": "round_robin"})["current"] == "round_robin"
        assert fetch(f"{control}/readyz")[0] == 200
        assert fetch(f"{control}/backends/nobody")[0] == 404
        location = fetch(f"{control}/backends", {"id": "n", "url": own_paths.url})[1]["location"]
        assert urljoin(f"{control}/backends", location) == f"{control}/backends/n"
        assert fetch(f"{balancer.url}/lbstatus")[2] == b"backend /lbstatus"
        assert "content-security-policy" in fetch(f"{control}/dashboard")[1]


def test_with_a_port_of_its_own_the_control_api_is_nowhere_else(own_paths: WireBackend) -> None:
    port = free_port()
    with BalancerProcess(f"--backend=b={own_paths.url}", f"--control-port={port}", wait_ready=False) as balancer:
        assert_forwarded(balancer.url)
        control = f"http://127.0.0.1:{port}"
        assert fetch_json(f"{control}/status")["statistics"]["total_requests"] > 0
        assert fetch_json(f"{control}/algorithm", {"algorithm": "round_robin"})["current"] == "round_robin"
        status, _, body = fetch(f"{control}/anything")  # not forwarded from here
        assert status == 404 and json.loads(body)["error"]
        wait_until(lambda: f"control API on {control}" in balancer.output)
    assert balancer.wait() == 0


def test_a_path_that_only_looks_like_a_control_path_is_forwarded(own_paths: WireBackend) -> None:
    with Balancer(f"--backend=b={own_paths.url}") as balancer:
        for path in ("/status/", "/statuses", "/STATUS", "/api/status", "/health/x", "/dashboard.html", "//status"):
            assert fetch(balancer.url + path)[2] == b"backend " + path.encode()
        assert "lifecycle" in fetch_json(f"{balancer.url}/%73tatus")  # the same path in other letters

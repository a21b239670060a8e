"""The control API: every operation on Flask's own test client, and what only a real process can show."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from flask.testing import FlaskClient
from fleet import Demo
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
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
    make_attempt,
    make_record,
    ok,
    read_all,
    wait_until,
)
from werkzeug.test import Client, TestResponse
from wire import WireBackend, post, read_response

from balancer.balancing.backends import LastCheck
from balancer.config.settings import BackendSettings, Settings
from balancer.loadbalancer import create_app

ALGORITHMS = {"round_robin", "weighted", "least_connections", "power_of_two", "least_response_time", "peak_ewma"}
TOKEN = "s3cret-t0ken-of-the-test"
ALLOWED = "https://ops.example"
FOREIGN = "https://evil.example"
WEIGHTS = (("a", 3), ("b", 2), ("c", 1))


def make_app(**settings: Any) -> Flask:
    """An app that is wired but not started: no health checks run and nothing listens on the backends' port."""
    backends = tuple(BackendSettings(id=name, url="http://127.0.0.1:9", weight=weight) for name, weight in WEIGHTS)
    return create_app(Settings(**({"backends": backends} | settings)))


@pytest.fixture
def app() -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def check_all(app: Flask, error: str | None = None) -> None:
    """One round of health checks, all good or all failed with `error`."""
    pool = app.extensions["control"].pool
    for backend in pool.backends():
        pool.record_check(backend, LastCheck(time.time(), 0.003, 200 if error is None else None, error))


def add_exchanges(app: Flask, count: int, status: int = 200) -> None:
    statistics = app.extensions["control"].statistics
    for number in range(count):
        statistics.begin()
        statistics.record(
            make_record(
                "a",
                status,
                0.012,
                timestamp=time.time(),
                path=f"/{number}",
                request_id=f"id-{number}",
                attempts=[make_attempt("a", str(status))],
            )
        )


def state(app: Flask) -> tuple[Any, ...]:
    """Everything that a refused request must leave alone."""
    control = app.extensions["control"]
    whole, by_backend, recent = control.statistics.snapshot(100)
    return control.pool.algorithm, control.pool.snapshot(), whole["total_requests"], by_backend, recent


def events(app: Flask) -> list[dict[str, Any]]:
    newer: list[dict[str, Any]] = app.extensions["control"].events.since(0)[0]
    return newer


def assert_error(response: TestResponse, status: int, *words: str) -> dict[str, Any]:
    """A JSON error that a person can act on."""
    assert response.status_code == status, response.text
    assert response.mimetype in ("application/json", "application/problem+json")
    body: dict[str, Any] = json.loads(response.data)
    assert isinstance(body["error"], str) and body["error"]
    assert "Traceback" not in response.text and 'File "' not in response.text
    for word in words:
        assert word in body["error"]
    return body


# GET /status.

NUMBER, COUNT, TEXT, FLAG = (int, float), int, str, bool
LATENCY = {"p50": (int, float, type(None)), "p95": (int, float, type(None)), "p99": (int, float, type(None))}
CODES = dict.fromkeys(("1xx", "2xx", "3xx", "4xx", "5xx"), COUNT)
COUNTERS: dict[str, Any] = {
    "total_requests": COUNT,
    "successful_requests": COUNT,
    "failed_requests": COUNT,
    "aborted_requests": COUNT,
    "latency": LATENCY,
    "codes": CODES,
}
STATUS: dict[str, Any] = {
    "schema_version": COUNT,
    "version": TEXT,
    "load_balancer_id": TEXT,
    "algorithm": TEXT,
    "lifecycle": TEXT,
    "now": NUMBER,
    "uptime": NUMBER,
    "events_seq": COUNT,
    "statistics": COUNTERS
    | {
        "start_time": NUMBER,
        "active_requests": COUNT,
        "queued_requests": COUNT,
        "retries": COUNT,
        "unassigned_requests": COUNT,
        "requests_per_second": NUMBER,
    },
    "backend_servers": [
        COUNTERS
        | {
            "id": TEXT,
            "url": TEXT,
            "healthy": FLAG,
            "active_connections": COUNT,
            "weight": COUNT,
            "avg_response_time": NUMBER,
            "state": TEXT,
            "admin_state": TEXT,
            "max_connections": (int, type(None)),
            "expected_share": (int, float, type(None)),
            "health": {
                "status": TEXT,
                "reason": (str, type(None)),
                "since": NUMBER,
                "fall": COUNT,
                "rise": COUNT,
                "consecutive_failures": COUNT,
                "consecutive_successes": COUNT,
                "last_check": {
                    "at": NUMBER,
                    "duration": NUMBER,
                    "status": (int, type(None)),
                    "error": (str, type(None)),
                },
            },
        }
    ],
    "recent_requests": [
        {
            "timestamp": NUMBER,
            "server_id": (str, type(None)),
            "response_time": NUMBER,
            "status": COUNT,
            "method": TEXT,
            "path": TEXT,
            "request_id": TEXT,
            "attempts": COUNT,
            "reason": (str, type(None)),
        }
    ],
    "capabilities": {
        "writes": FLAG,
        "token_required": FLAG,
        "authorized": FLAG,
        "traffic": FLAG,
        "algorithms": [{"name": TEXT, "description": TEXT}],
    },
}


def assert_shape(value: Any, shape: Any, path: str = "status") -> None:
    """Every field of `shape` is there with its type; more fields may be."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), path
        for name, wanted in shape.items():
            assert name in value, f"{path}.{name} is missing"
            assert_shape(value[name], wanted, f"{path}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, path
        for item in value:
            assert_shape(item, shape[0], f"{path}[]")
    else:
        assert isinstance(value, shape), f"{path} = {value!r}"
        assert shape is FLAG or not isinstance(value, bool), f"{path} = {value!r}"


def test_status_has_the_fields_and_types_of_the_contract(app: Flask, client: FlaskClient) -> None:
    check_all(app)
    add_exchanges(app, 3)
    answer = client.get("/status")
    assert answer.status_code == 200 and answer.mimetype == "application/json"
    assert answer.json is not None
    assert_shape(answer.json, STATUS)
    assert [backend["id"] for backend in answer.json["backend_servers"]] == ["a", "b", "c"]
    assert {algorithm["name"] for algorithm in answer.json["capabilities"]["algorithms"]} >= ALGORITHMS


@pytest.mark.parametrize(("settings", "traffic"), [({}, True), ({"control_port": 9001}, False)])
def test_status_says_whether_its_address_forwards_requests(settings: dict[str, Any], traffic: bool) -> None:
    """The dashboard sent its test requests to the control port, where each was a 404."""
    control = make_app(**settings).extensions["balancer"].control_app
    answer = json.loads(Client(control).get("/status", environ_base={"REMOTE_ADDR": "127.0.0.1"}).data)
    assert answer["capabilities"]["traffic"] is traffic


def test_status_of_a_balancer_without_traffic_or_checks(client: FlaskClient) -> None:
    status = client.get("/status").json
    assert status is not None
    assert status["recent_requests"] == []
    assert status["statistics"]["latency"] == {"p50": None, "p95": None, "p99": None}
    first = status["backend_servers"][0]
    assert (first["state"], first["healthy"], first["health"]["last_check"]) == ("unknown", False, None)


def test_status_counts_successes_failures_and_unassigned(app: Flask, client: FlaskClient) -> None:
    add_exchanges(app, 4)
    add_exchanges(app, 2, status=502)
    assert client.get("/api/process").status_code == 503  # no backend is up
    status = client.get("/status").json
    assert status is not None
    whole = status["statistics"]
    assert (whole["total_requests"], whole["successful_requests"], whole["failed_requests"]) == (7, 4, 3)
    assert whole["unassigned_requests"] == 1
    assert whole["codes"] == {"1xx": 0, "2xx": 4, "3xx": 0, "4xx": 0, "5xx": 3}
    newest = status["recent_requests"][0]
    assert (newest["status"], newest["server_id"], newest["method"]) == (503, None, "GET")


def test_status_shows_why_a_backend_is_down(app: Flask, client: FlaskClient) -> None:
    check_all(app, "health check failed: refused")
    backend = client.get("/status").json["backend_servers"][0]  # type: ignore[index]
    assert (backend["healthy"], backend["state"], backend["health"]["status"]) == (False, "down", "down")
    assert backend["health"]["reason"] == "health check failed: refused"
    assert backend["health"]["consecutive_failures"] == 1


@pytest.mark.parametrize(
    ("query", "expected"), [("", 20), ("?recent=0", 0), ("?recent=1", 1), ("?recent=99", 99), ("?recent=100", 100)]
)
def test_recent_requests_newest_first_and_bounded(app: Flask, client: FlaskClient, query: str, expected: int) -> None:
    add_exchanges(app, 130)
    recent = client.get(f"/status{query}").json["recent_requests"]  # type: ignore[index]
    assert [entry["path"] for entry in recent] == [f"/{number}" for number in range(129, 129 - expected, -1)]


@pytest.mark.parametrize("value", ["101", "-1", "x", "", "1.5", "1e1", "9" * 400, "%D9%A3", "NaN"])
def test_recent_out_of_bounds_is_refused_with_the_bounds(client: FlaskClient, value: str) -> None:
    assert_error(client.get(f"/status?recent={value}"), 400, "recent", "0", "100")


# Probes.


@pytest.mark.parametrize("path", ["/health", "/livez"])
def test_alive_says_so_before_the_first_health_round(client: FlaskClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.json == {"status": "healthy", "load_balancer_id": "lb-1"}


def test_ready_only_after_the_first_round_and_not_while_draining(app: Flask, client: FlaskClient) -> None:
    assert client.get("/readyz").status_code == 503
    check_all(app)
    app.extensions["control"].lifecycle = "running"
    assert client.get("/readyz").status_code == 200
    app.extensions["control"].lifecycle = "draining"
    assert client.get("/readyz").status_code == 503
    assert client.get("/health").status_code == 200


def test_ready_after_a_first_round_in_which_all_failed(app: Flask, client: FlaskClient) -> None:
    """The balancer did its part; taking it out of service would not help."""
    check_all(app, "health check failed: refused")
    assert client.get("/readyz").status_code == 200


def test_a_backend_added_later_does_not_make_the_balancer_unready(app: Flask, client: FlaskClient) -> None:
    check_all(app)
    app.extensions["control"].lifecycle = "running"
    assert client.post("/backends", json={"id": "new", "url": "http://127.0.0.1:9"}).status_code == 201
    assert client.get("/readyz").status_code == 200


# The algorithm.


def test_algorithms_are_listed_with_a_paragraph_each(client: FlaskClient) -> None:
    answer = client.get("/algorithm").json
    assert answer is not None
    assert answer["current"] == "weighted"
    assert {entry["name"] for entry in answer["algorithms"]} >= ALGORITHMS
    assert all(len(entry["description"]) > 40 for entry in answer["algorithms"])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_switching_the_algorithm(app: Flask, client: FlaskClient, name: str) -> None:
    answer = client.post("/algorithm", json={"algorithm": name})
    assert answer.status_code == 200
    assert answer.json is not None and answer.json["current"] == name and name in answer.json["message"]
    assert client.get("/algorithm").json["current"] == name  # type: ignore[index]
    assert client.get("/status").json["algorithm"] == name  # type: ignore[index]


def test_blanks_around_an_algorithm_are_not_part_of_it(client: FlaskClient) -> None:
    assert client.post("/algorithm", json={"algorithm": "round_robin "}).json["current"] == "round_robin"  # type: ignore[index]


@pytest.mark.parametrize("name", ["", "fastest", "ROUND_ROBIN", "weighted\x00", "\ud800", "x" * 5000, "../weighted"])
def test_unknown_algorithm_names_the_valid_ones(app: Flask, client: FlaskClient, name: str) -> None:
    before = state(app)
    body = assert_error(client.post("/algorithm", json={"algorithm": name}), 400)
    assert set(body["valid_options"]) >= ALGORITHMS
    assert len(body["error"]) < 1000
    assert state(app) == before


def test_switching_is_an_event_and_switching_to_the_same_changes_nothing(app: Flask, client: FlaskClient) -> None:
    client.post("/algorithm", json={"algorithm": "round_robin"})
    assert (events(app)[-1]["kind"], events(app)[-1]["message"]) == ("algorithm_changed", "round_robin")
    check_all(app)
    pool = app.extensions["control"].pool
    served = []
    for _ in WEIGHTS:
        served.append(pool.lease(None).backend.id)
        assert client.post("/algorithm", json={"algorithm": "round_robin"}).status_code == 200
    assert sorted(served) == ["a", "b", "c"]  # its turn-taking goes on


# Reset.


@pytest.mark.parametrize("body", [None, b"", b"{}"])
def test_reset_zeroes_the_statistics(app: Flask, client: FlaskClient, body: bytes | None) -> None:
    """Without a body and without a Content-Type too, as `curl -X POST` sends it."""
    add_exchanges(app, 5)
    before = client.get("/status").json["statistics"]["start_time"]  # type: ignore[index]
    content_type = "application/json" if body else None
    answer = client.post("/reset", data=body, content_type=content_type)
    assert answer.status_code == 200 and answer.json is not None and answer.json["message"]
    status = client.get("/status").json
    assert status is not None
    assert status["statistics"]["total_requests"] == 0
    assert status["statistics"]["start_time"] >= before
    assert status["recent_requests"] == []
    assert status["backend_servers"][0]["total_requests"] == 0
    assert status["backend_servers"][0]["weight"] == 3  # configuration stays
    assert events(app)[-1]["kind"] == "statistics_reset"


def test_reset_keeps_what_is_in_flight(app: Flask, client: FlaskClient) -> None:
    statistics = app.extensions["control"].statistics
    statistics.begin()
    client.post("/reset")
    assert client.get("/status").json["statistics"]["active_requests"] == 1  # type: ignore[index]
    statistics.record(make_record("a", 200, 0.1))
    after = client.get("/status").json["statistics"]  # type: ignore[index]
    assert (after["active_requests"], after["total_requests"]) == (0, 1)


# Backends.


def test_backends_are_listed_in_configured_order(client: FlaskClient) -> None:
    listed = client.get("/backends").json["backends"]  # type: ignore[index]
    assert [(backend["id"], backend["weight"]) for backend in listed] == list(WEIGHTS)
    assert client.get("/backends/b").json == listed[1]


def test_adding_a_backend(app: Flask, client: FlaskClient) -> None:
    wanted = {"id": "new-1", "url": "http://127.0.0.1:8080", "weight": 7, "max_connections": 20}
    answer = client.post("/backends", json=wanted)
    assert answer.status_code == 201
    assert answer.headers["Location"].endswith("/backends/new-1")
    assert answer.json is not None
    assert {name: answer.json[name] for name in wanted} == wanted
    assert (answer.json["healthy"], answer.json["state"]) == (False, "unknown")
    assert client.get("/backends/new-1").json == answer.json
    assert (events(app)[-1]["kind"], events(app)[-1]["backend"]) == ("backend_added", "new-1")


def test_adding_a_backend_by_url_alone_chooses_a_free_id(client: FlaskClient) -> None:
    ids = [client.post("/backends", json={"url": "http://127.0.0.1:8080"}).json["id"] for _ in range(3)]  # type: ignore[index]
    assert len({*ids, "a", "b", "c"}) == 6
    assert client.post("/backends", json={"url": "https://backend.example"}).json["url"] == (  # type: ignore[index]
        "https://backend.example:443"
    )


def test_a_taken_id_is_a_conflict(app: Flask, client: FlaskClient) -> None:
    before = state(app)
    assert_error(client.post("/backends", json={"id": "a", "url": "http://127.0.0.1:8080"}), 409, "'a'")
    assert state(app) == before


BAD_URLS = [
    "",
    "127.0.0.1:80",
    "ftp://127.0.0.1",
    "http://",
    "http://127.0.0.1:0",
    "http://127.0.0.1:65536",
    "http://127.0.0.1:x",
    "http://user:pw@127.0.0.1",
    "http://127.0.0.1/path",
    "http://127.0.0.1/?query",
    "http://127.0.0.1/#part",
    "http://[::1",
    "http://[::1]x:80",
    "http://x[::1]:80",
    "http://[v1.x]:80",
    "http://[v1.x]",
    "http://host name",
    "http://h\u00f6st",
    "http://a\r\nHost: b",
    "http://a..b",
    "http://" + "a" * 64,
    "file:///etc/passwd",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_wrong_backend_url_is_refused(app: Flask, client: FlaskClient, url: str) -> None:
    before = state(app)
    assert_error(client.post("/backends", json={"id": "new", "url": url}), 422, "URL")
    assert state(app) == before


def test_the_refusal_of_a_url_with_a_password_does_not_repeat_it(client: FlaskClient) -> None:
    answer = client.post("/backends", json={"url": "http://user:pa55word@127.0.0.1"})
    assert answer.status_code == 422 and "pa55word" not in answer.text


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 0},
        {"weight": 256},
        {"max_connections": 1},
        {"max_connections": None},
        {"admin_state": "drain"},
        {"admin_state": "maint"},
        {"weight": 5, "max_connections": 9, "admin_state": "ready"},
    ],
)
def test_changing_a_backend(app: Flask, client: FlaskClient, change: dict[str, Any]) -> None:
    check_all(app)
    before = client.get("/backends/a").json
    assert before is not None
    answer = client.patch("/backends/a", json=change)
    assert answer.status_code == 200 and answer.json is not None
    assert {name: answer.json[name] for name in change} == change
    states = {"ready": "up", "drain": "drained", "maint": "maint"}
    assert answer.json["state"] == states[answer.json["admin_state"]]
    again = client.patch("/backends/a", json=change)  # idempotent
    assert again.json == answer.json
    seen = [event["message"] for event in events(app) if event["kind"] == "backend_changed"]
    assert seen == [f"{name} set to {value}" for name, value in change.items() if before[name] != value]


def test_expected_shares_follow_weight_and_state(app: Flask, client: FlaskClient) -> None:
    check_all(app)

    def shares() -> list[float]:
        return [backend["expected_share"] for backend in client.get("/backends").json["backends"]]  # type: ignore[index]

    assert shares() == [3 / 6, 2 / 6, 1 / 6]
    client.patch("/backends/a", json={"weight": 1})
    assert shares() == [1 / 4, 2 / 4, 1 / 4]
    client.patch("/backends/b", json={"admin_state": "drain"})
    assert shares() == [1 / 2, 0, 1 / 2]
    client.post("/algorithm", json={"algorithm": "least_connections"})
    assert shares() == [None, None, None]


def test_removing_an_idle_backend(app: Flask, client: FlaskClient) -> None:
    answer = client.delete("/backends/b")
    assert answer.status_code == 200 and answer.json is not None and answer.json["active"] == 0
    assert [backend["id"] for backend in client.get("/backends").json["backends"]] == ["a", "c"]  # type: ignore[index]
    assert_error(client.delete("/backends/b"), 404)
    assert events(app)[-1]["kind"] == "backend_removed"


def test_removing_a_busy_backend_waits_for_its_last_request(app: Flask, client: FlaskClient) -> None:
    pool = app.extensions["control"].pool
    check_all(app)
    lease = pool.lease(None, exclude=["b", "c"])
    answer = client.delete("/backends/a")
    assert answer.status_code == 202 and answer.json is not None and answer.json["active"] == 1
    shown = client.get("/backends/a").json
    assert shown is not None and (shown["state"], shown["active_connections"]) == ("drain", 1)
    assert pool.lease(None).backend.id != "a"
    lease.release()
    assert_error(client.get("/backends/a"), 404)


def test_making_a_backend_ready_calls_its_removal_off(app: Flask, client: FlaskClient) -> None:
    """It must not take requests again and then vanish."""
    pool = app.extensions["control"].pool
    check_all(app)
    lease = pool.lease(None, exclude=["b", "c"])
    assert client.delete("/backends/a").status_code == 202
    assert client.patch("/backends/a", json={"admin_state": "ready"}).status_code == 200
    lease.release()
    shown = client.get("/backends/a").json
    assert shown is not None and (shown["state"], shown["active_connections"]) == ("up", 0)
    assert pool.lease(None, exclude=["b", "c"]).backend.id == "a"


def test_the_last_backend_can_be_removed_and_one_added_again(app: Flask, client: FlaskClient) -> None:
    for name in "abc":
        client.delete(f"/backends/{name}")
    assert client.get("/backends").json == {"backends": []}
    assert client.get("/status").status_code == 200
    assert client.get("/api/process").status_code == 503
    assert client.post("/backends", json={"id": "a", "url": "http://127.0.0.1:9"}).status_code == 201
    assert client.get("/status").json["backend_servers"][0]["total_requests"] == 0  # type: ignore[index]


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("name", ["nobody", "A", "%00", "a%20", "%C3%A4", "a%2Fb", "x" * 3000])
def test_an_unknown_backend_is_not_found(app: Flask, client: FlaskClient, method: str, name: str) -> None:
    before = state(app)
    body = {"json": {"weight": 1}} if method == "PATCH" else {}
    error = assert_error(client.open(f"/backends/{name}", method=method, **body), 404)  # type: ignore[arg-type]
    assert len(error["error"]) < 1000
    assert state(app) == before


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/status", "GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
        ("/livez", "GET, HEAD, OPTIONS"),
        ("/readyz", "GET, HEAD, OPTIONS"),
        ("/events", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/dashboard", "GET, HEAD, OPTIONS"),
        ("/algorithm", "GET, HEAD, OPTIONS, POST"),
        ("/reset", "OPTIONS, POST"),
        ("/backends", "GET, HEAD, OPTIONS, POST"),
        ("/backends/a", "DELETE, GET, HEAD, OPTIONS, PATCH"),
    ],
)
def test_a_wrong_method_names_the_right_ones_and_is_not_forwarded(
    app: Flask, client: FlaskClient, path: str, allowed: str
) -> None:
    before = state(app)
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "MADEUP"} - set(allowed.split(", ")):
        answer = client.open(path, method=method)
        assert_error(answer, 405)
        assert answer.headers["Allow"] == allowed
    assert state(app) == before


def test_reads_never_change_anything(app: Flask, client: FlaskClient) -> None:
    before = state(app), events(app)
    for path in ("/status", "/algorithm?algorithm=round_robin", "/backends/a?weight=0", "/events", "/backends?id=x"):
        assert client.get(path, json={"algorithm": "round_robin"}).status_code == 200
        assert client.head(path).status_code == 200
    assert client.get("/reset").status_code == 405
    assert (state(app), events(app)) == before


# Events.


def test_events_have_a_rising_seq_and_can_be_asked_for_from_one_on(app: Flask, client: FlaskClient) -> None:
    check_all(app)
    client.patch("/backends/a", json={"weight": 9})
    client.post("/reset")
    everything = client.get("/events").json
    assert everything is not None
    seqs = [event["seq"] for event in everything["events"]]
    assert seqs == list(range(1, len(seqs) + 1)) and everything["latest"] == seqs[-1]
    assert client.get("/status").json["events_seq"] == seqs[-1]  # type: ignore[index]
    newer = client.get(f"/events?since={seqs[-2]}").json
    assert newer is not None
    assert newer["events"] == everything["events"][-1:] and newer["latest"] == seqs[-1]
    nothing = client.get(f"/events?since={seqs[-1]}").json
    assert nothing == {"events": [], "latest": seqs[-1]}
    assert_shape(
        everything["events"][0],
        {
            "seq": COUNT,
            "timestamp": NUMBER,
            "kind": TEXT,
            "backend": (str, type(None)),
            "message": TEXT,
            "severity": TEXT,
        },
        "event",
    )


def test_the_newest_500_events_are_kept(app: Flask, client: FlaskClient) -> None:
    for number in range(510):
        app.extensions["control"].events.add("made_up", None, str(number))
    kept = client.get("/events?since=0").json
    assert kept is not None
    assert [event["message"] for event in kept["events"]] == [str(number) for number in range(10, 510)]


@pytest.mark.parametrize("value", ["-1", "x", "", "1.5", "9" * 30])
def test_a_wrong_since_is_refused(client: FlaskClient, value: str) -> None:
    assert_error(client.get(f"/events?since={value}"), 400, "since")


# Bad bodies.

WRITES = [("POST", "/algorithm"), ("POST", "/reset"), ("POST", "/backends"), ("PATCH", "/backends/a")]
FIELDS = {"/algorithm": "algorithm", "/reset": "no fields", "/backends": "url", "/backends/a": "weight"}
NOT_JSON = {
    "open brace": b"{",
    "word": b"weighted",
    "form": b"algorithm=weighted",
    "single quotes": b"{'algorithm': 'weighted'}",
    "trailing comma": b'{"algorithm": "weighted",}',
    "two values": b'{"algorithm": "weighted"} {}',
    "NaN": b'{"weight": NaN, "url": "http://127.0.0.1:9"}',
    "Infinity": b'{"weight": Infinity}',
    "-Infinity": b'{"weight": -Infinity}',
    "number of 5000 digits": b'{"weight": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"algorithm": "\xff\xfe\xfa"}',
    "zero bytes": b"\x00" * 20,
    "deep array": b"[" * 60000,
    "deep object": b'{"a":' * 12000,
    "deep and closed": b'{"weight": ' + b"[" * 20000 + b"]" * 20000 + b"}",
    "blank": b"  \n",
}
NOT_AN_OBJECT = {"array": b"[]", "number": b"3", "null": b"null", "string": b'"weighted"', "true": b"true"}


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("name", NOT_JSON)
def test_a_body_that_is_not_json_is_refused(app: Flask, client: FlaskClient, method: str, path: str, name: str) -> None:
    before = state(app), events(app)
    answer = client.open(path, method=method, data=NOT_JSON[name], content_type="application/json")
    body = assert_error(answer, 400, "JSON")
    assert len(body["error"]) < 1000
    assert (state(app), events(app)) == before


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("name", NOT_AN_OBJECT)
def test_json_that_is_no_object_is_refused(app: Flask, client: FlaskClient, method: str, path: str, name: str) -> None:
    before = state(app), events(app)
    answer = client.open(path, method=method, data=NOT_AN_OBJECT[name], content_type="application/json")
    assert_error(answer, 400, "object")
    assert (state(app), events(app)) == before


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_an_unknown_field_is_refused_and_the_known_ones_named(
    app: Flask, client: FlaskClient, method: str, path: str
) -> None:
    before = state(app), events(app)
    valid = {"/algorithm": {"algorithm": "round_robin"}, "/backends": {"url": "http://127.0.0.1:9"}}
    answer = client.open(path, method=method, json=valid.get(path, {}) | {"colour": "red"})
    legacy = path in ("/algorithm", "/reset")
    assert_error(answer, 400 if legacy else 422, "colour", FIELDS[path])
    assert (state(app), events(app)) == before


@pytest.mark.parametrize(("method", "path"), [write for write in WRITES if write[1] != "/reset"])
def test_an_empty_body_is_refused_with_what_is_expected(
    app: Flask, client: FlaskClient, method: str, path: str
) -> None:
    before = state(app), events(app)
    for body in (b"", b"{}"):
        answer = client.open(path, method=method, data=body, content_type="application/json")
        assert_error(answer, 400 if path == "/algorithm" else 422, FIELDS[path])
    assert (state(app), events(app)) == before


WRONG_VALUES = [
    ("POST", "/algorithm", {"algorithm": None}, "algorithm"),
    ("POST", "/algorithm", {"algorithm": 5}, "algorithm"),
    ("POST", "/algorithm", {"algorithm": ["weighted"]}, "algorithm"),
    ("POST", "/algorithm", {"algorithm": {"name": "weighted"}}, "algorithm"),
    ("POST", "/backends", {"url": 5}, "url"),
    ("POST", "/backends", {"url": None}, "url"),
    ("POST", "/backends", {"url": "http://" + "a." * 300}, "url"),
    ("POST", "/backends", {"id": "a b"}, "id"),
    ("POST", "/backends", {"id": ""}, "id"),
    ("POST", "/backends", {"id": "x\n"}, "id"),
    ("POST", "/backends", {"id": "<script>"}, "id"),
    ("POST", "/backends", {"id": "x" * 65}, "id"),
    ("POST", "/backends", {"id": 7}, "id"),
    ("POST", "/backends", {"id": "\ud800"}, "id"),
    ("POST", "/backends", {"id": "."}, "id"),
    ("POST", "/backends", {"id": ".."}, "id"),
    *(
        (method, path, {"weight": value}, "weight")
        for method, path in (("POST", "/backends"), ("PATCH", "/backends/a"))
        for value in (-1, 257, 10**30, 1.5, 1e300, "3", True, None, [3], {})
    ),
    *(
        (method, path, {"max_connections": value}, "max_connections")
        for method, path in (("POST", "/backends"), ("PATCH", "/backends/a"))
        for value in (0, -1, 10**30, 2.5, "9", False)
    ),
    *(
        ("PATCH", "/backends/a", {"admin_state": value}, "admin_state")
        for value in ("up", "READY", "", None, 1, True, ["drain"])
    ),
    ("PATCH", "/backends/a", {"weight": 5, "admin_state": "gone"}, "admin_state"),  # nothing is changed half
    ("PATCH", "/backends/a", {"id": "b"}, "id"),
    ("PATCH", "/backends/a", {"url": "http://127.0.0.1:10"}, "url"),
]


@pytest.mark.parametrize(("method", "path", "body", "field"), WRONG_VALUES)
def test_a_wrong_value_is_refused_and_named(
    app: Flask, client: FlaskClient, method: str, path: str, body: dict[str, Any], field: str
) -> None:
    before = state(app), events(app)
    if path == "/backends":
        body = {"url": "http://127.0.0.1:9"} | body
    assert_error(client.open(path, method=method, json=body), 400 if path == "/algorithm" else 422, field)
    assert (state(app), events(app)) == before


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/algorithm", {}, "algorithm: is missing; expected name from GET /algorithm (fields: algorithm)"),
        ("POST", "/algorithm", {"algorithm": 3}, "algorithm = 3: expected text: name from GET /algorithm"),
        ("POST", "/reset", {"x": 1}, "unknown field 'x' (fields: no fields)"),
        ("PATCH", "/backends/a", {"weight": 257}, "weight = 257: expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"weight": True}, "weight = true: expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"weight": "3"}, "weight = '3': expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"max_connections": 0}, "max_connections = 0: expected a whole number from 1 to "),
        ("PATCH", "/backends/a", {"admin_state": "off"}, "admin_state = 'off': expected ready, drain or maint"),
        ("POST", "/backends", {"url": "http://x", "id": "a b"}, "id = 'a b': expected up to 64 letters"),
        (
            "POST",
            "/backends",
            {"url": "http://u:pa55word@" + "x" * 300},
            "url = (hidden): expected text of at most 300",
        ),
        ("POST", "/backends", {"url": None}, "url = null: expected text of at most 300"),
        ("POST", "/backends", {"url": 3}, "url = 3: expected text of at most 300 characters: http://HOST:PORT or "),
    ],
)
def test_a_refusal_says_what_is_accepted(
    client: FlaskClient, method: str, path: str, body: dict[str, Any], said: str
) -> None:
    assert said in client.open(path, method=method, json=body).json["error"]


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_body_of_100_kb_is_refused_with_the_limit(app: Flask, client: FlaskClient, method: str, path: str) -> None:
    before = state(app), events(app)
    data = b'{"algorithm": "' + b"x" * 100_000 + b'"}'
    assert_error(client.open(path, method=method, data=data, content_type="application/json"), 413, "65536")
    assert (state(app), events(app)) == before


def test_errors_of_new_paths_are_problem_details_and_those_of_old_paths_plain_json(client: FlaskClient) -> None:
    answer = client.get("/backends/nobody")
    assert answer.mimetype == "application/problem+json"
    assert answer.json is not None
    assert answer.json["status"] == 404 and answer.json["title"] and answer.json["detail"] == answer.json["error"]
    assert client.post("/algorithm", json={"algorithm": "x"}).mimetype == "application/json"
    assert client.get("/status?recent=x").mimetype == "application/json"


# Who may write.


def write(client: FlaskClient, headers: dict[str, str], **options: Any) -> TestResponse:
    return client.post("/algorithm", json={"algorithm": "round_robin"}, headers=headers, **options)


def assert_refused(app: Flask, answer: TestResponse, status: int, *words: str) -> None:
    assert_error(answer, status, *words)
    assert app.extensions["control"].pool.algorithm == "weighted"
    last = events(app)[-1]
    assert (last["kind"], last["severity"]) == ("write_refused", "warning")
    assert "/algorithm" in last["message"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:9000", "LOCALHOST:80"])
def test_a_program_on_this_machine_may_write(client: FlaskClient, host: str) -> None:
    assert write(client, {"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:9000"])
def test_the_dashboard_of_the_balancer_may_write(client: FlaskClient, host: str) -> None:
    assert write(client, {"Host": host, "Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [FOREIGN, "http://localhost:1", "https://localhost", "http://localhost.evil.example", "http://127.0.0.1", "x", ""],
)
def test_a_page_of_another_site_may_not_write(app: Flask, client: FlaskClient, origin: str) -> None:
    assert_refused(app, write(client, {"Origin": origin}), 403, "cors_origins")


@pytest.mark.parametrize(("method", "path"), [*WRITES, ("DELETE", "/backends/a")])
def test_every_write_is_guarded(app: Flask, client: FlaskClient, method: str, path: str) -> None:
    before = state(app)
    assert_error(client.open(path, method=method, json={}, headers={"Origin": FOREIGN}), 403)
    assert state(app) == before
    assert path in events(app)[-1]["message"] and method in events(app)[-1]["message"]


def test_an_origin_on_the_list_may_write() -> None:
    client = make_app(cors_origins=(ALLOWED,)).test_client()
    assert write(client, {"Origin": ALLOWED}).status_code == 200
    assert write(client, {"Origin": ALLOWED + ".evil.example"}).status_code == 403
    assert write(client, {"Origin": ALLOWED.replace("https", "http")}).status_code == 403


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_what_a_form_can_send_is_refused(app: Flask, client: FlaskClient, content_type: str | None) -> None:
    body = b'{"algorithm": "round_robin"}'
    for headers in ({"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {}):
        answer = client.post("/algorithm", data=body, content_type=content_type, headers=headers)
        assert_refused(app, answer, 415, "application/json")


def test_a_reset_without_body_from_a_browser_is_refused(app: Flask, client: FlaskClient) -> None:
    """Any page can send one without asking; curl can too, but curl is not lured to a page."""
    add_exchanges(app, 1)
    for headers in ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": FOREIGN}):
        assert client.post("/reset", headers=headers).status_code in (403, 415)
    assert client.get("/status").json["statistics"]["total_requests"] == 1  # type: ignore[index]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9000", "localhost.evil.example", "10.0.0.1", "[::2]"])
def test_a_name_made_to_resolve_to_us_may_not_write(app: Flask, client: FlaskClient, host: str) -> None:
    assert_refused(app, write(client, {"Host": host}), 403, "Host")
    assert write(client, {"Host": host, "Origin": f"http://{host}"}).status_code == 403


def test_without_a_token_nobody_writes_over_the_network() -> None:
    app = make_app(host="0.0.0.0")
    client = app.test_client()
    assert_refused(app, write(client, {}), 403, "LB_ADMIN_TOKEN")
    reading = make_app(host="0.0.0.0", control_reads="open").test_client()
    assert reading.get("/status").json["capabilities"]["writes"] is False  # type: ignore[index]


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \u00fc\u00fc"],
)
def test_a_wrong_token_or_none_is_refused(given: str | None) -> None:
    app = make_app(admin_token=TOKEN, host="0.0.0.0")
    headers = {} if given is None else {"Authorization": given}
    answer = write(app.test_client(), headers)
    assert_refused(app, answer, 401, "token")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_right_token_is_accepted_from_anywhere_but_other_sites() -> None:
    client = make_app(admin_token=TOKEN, host="0.0.0.0", cors_origins=(ALLOWED,)).test_client()
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert write(client, right | {"Host": "balancer.example"}).status_code == 200
    assert write(client, right | {"Origin": ALLOWED}).status_code == 200
    assert write(client, right | {"Origin": "null"}).status_code == 200
    assert write(client, right | {"Origin": FOREIGN}).status_code == 403
    capabilities = client.get("/status", headers=right).json["capabilities"]  # type: ignore[index]
    assert (capabilities["writes"], capabilities["token_required"], capabilities["authorized"]) == (True, True, True)


def test_the_scheme_word_of_a_token_is_not_case_sensitive() -> None:
    """RFC 9110 section 11.1."""
    client = make_app(admin_token=TOKEN).test_client()
    assert write(client, {"Authorization": f"bearer {TOKEN}"}).status_code == 200


# CORS.


def preflight(client: FlaskClient, path: str, method: str, origin: str) -> TestResponse:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    return client.options(path, headers=asked)


@pytest.mark.parametrize(("method", "path"), [*WRITES, ("DELETE", "/backends/a")])
def test_a_preflight_tells_an_allowed_origin_yes_and_a_foreign_one_nothing(method: str, path: str) -> None:
    app = make_app(cors_origins=(ALLOWED,))
    client = app.test_client()
    answer = preflight(client, path, method, ALLOWED)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == ALLOWED
    assert method in answer.headers["Access-Control-Allow-Methods"]
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert "content-type" in allowed and "authorization" in allowed
    assert "Access-Control-Allow-Credentials" not in answer.headers
    refused = preflight(client, path, method, FOREIGN)
    assert "Access-Control-Allow-Origin" not in refused.headers
    assert events(app) == []


def test_answers_can_be_read_by_allowed_origins_only() -> None:
    client = make_app(cors_origins=(ALLOWED,)).test_client()
    for origin, expected in ((ALLOWED, ALLOWED), ("null", None), (FOREIGN, None)):
        answer = client.get("/status", headers={"Origin": origin})
        assert answer.headers.get("Access-Control-Allow-Origin") == expected
    assert client.get("/backends/no", headers={"Origin": ALLOWED}).headers["Access-Control-Allow-Origin"] == ALLOWED


# The dashboard.


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


# OpenAPI.


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json  # type: ignore[assignment]
    return found


def routes(app: Flask) -> set[tuple[str, str]]:
    return {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }


def described(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {(m, path) for path, item in document["paths"].items() for m in item if m != "parameters"}


def test_the_description_is_valid_openapi_and_has_every_route(app: Flask, document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()
    assert document["openapi"].startswith("3.1")
    assert described(document) == routes(app)
    identifiers = [document["paths"][path][method]["operationId"] for method, path in described(document)]
    assert len(set(identifiers)) == len(identifiers)


def test_the_description_knows_the_prefix_and_the_token() -> None:
    app = make_app(control_prefix="/lb", admin_token=TOKEN)
    answer = app.test_client().get("/lb/openapi.json")
    document = answer.json
    assert document is not None
    OpenAPIV31SpecValidator(document).validate()
    base = urlsplit(document.get("servers", [{"url": ""}])[0]["url"]).path.rstrip("/")
    assert {(method, base + path) for method, path in described(document)} == routes(app)
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert TOKEN not in answer.text


def closed(schema: Any) -> Any:
    """The same schema, but fields that it does not name are errors."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {name: closed(value) for name, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        result.setdefault("additionalProperties", False)
    return result


def assert_described(document: dict[str, Any], method: str, template: str, answer: TestResponse) -> None:
    responses = document["paths"][template][method.lower()]["responses"]
    entry = responses.get(str(answer.status_code)) or responses[f"{answer.status_code // 100}XX"]
    assert list(entry["content"]) == [answer.mimetype], f"{method} {template} {answer.status_code}"
    if answer.mimetype in ("text/html", "text/plain"):
        return
    content = entry["content"][answer.mimetype]["schema"]
    is_error = answer.status_code >= 400 and answer.status_code != 503
    whole = {"components": document["components"], **content}
    Draft202012Validator(whole if is_error else closed(whole)).validate(answer.json)


CALLS: list[tuple[str, str, str, Any, int]] = [
    ("GET", "/status", "/status?recent=50", None, 200),
    ("GET", "/status", "/status?recent=x", None, 400),
    ("GET", "/health", "/health", None, 200),
    ("GET", "/livez", "/livez", None, 200),
    ("GET", "/readyz", "/readyz", None, 503),
    ("GET", "/algorithm", "/algorithm", None, 200),
    ("POST", "/algorithm", "/algorithm", {"algorithm": "round_robin"}, 200),
    ("POST", "/algorithm", "/algorithm", {"algorithm": "x"}, 400),
    ("POST", "/reset", "/reset", {}, 200),
    ("POST", "/reset", "/reset", {"x": 1}, 400),
    ("GET", "/backends", "/backends", None, 200),
    ("POST", "/backends", "/backends", {"id": "n", "url": "http://127.0.0.1:9"}, 201),
    ("POST", "/backends", "/backends", {"id": "a", "url": "http://127.0.0.1:9"}, 409),
    ("POST", "/backends", "/backends", {"id": "n"}, 422),
    ("GET", "/backends/{backend_id}", "/backends/a", None, 200),
    ("GET", "/backends/{backend_id}", "/backends/x", None, 404),
    ("PATCH", "/backends/{backend_id}", "/backends/a", {"weight": 1}, 200),
    ("PATCH", "/backends/{backend_id}", "/backends/a", {"weight": -1}, 422),
    ("PATCH", "/backends/{backend_id}", "/backends/x", {"weight": 1}, 404),
    ("DELETE", "/backends/{backend_id}", "/backends/a", None, 200),
    ("DELETE", "/backends/{backend_id}", "/backends/x", None, 404),
    ("GET", "/requests/{request_id}", "/requests/id-1", None, 200),
    ("GET", "/requests/{request_id}", "/requests/id-9", None, 404),
    ("GET", "/config", "/config", None, 200),
    ("POST", "/reload", "/reload?dry_run=1", None, 422),
    ("GET", "/events", "/events?since=0", None, 200),
    ("GET", "/events", "/events?since=x", None, 400),
    ("GET", "/history", "/history?step=10&since=5", None, 200),
    ("GET", "/history", "/history?step=2", None, 400),
    ("GET", "/metrics", "/metrics", None, 200),
    ("GET", "/openapi.json", "/openapi.json", None, 200),
    ("GET", "/dashboard", "/dashboard", None, 200),
]


def test_every_operation_is_tried(document: dict[str, Any]) -> None:
    assert {(method.lower(), template) for method, template, *_ in CALLS} == described(document)


@pytest.mark.parametrize(("method", "template", "path", "body", "status"), CALLS)
def test_every_operation_answers_as_described(
    document: dict[str, Any], method: str, template: str, path: str, body: Any, status: int
) -> None:
    app = make_app()
    if path != "/readyz":
        check_all(app)
    add_exchanges(app, 3)
    add_exchanges(app, 1, status=502)
    answer = app.test_client().open(path, method=method, **({} if body is None else {"json": body}))
    assert answer.status_code == status, answer.text
    assert_described(document, method, template, answer)


def test_ready_and_a_delayed_removal_answer_as_described(
    app: Flask, client: FlaskClient, document: dict[str, Any]
) -> None:
    check_all(app)
    app.extensions["control"].lifecycle = "running"
    assert_described(document, "GET", "/readyz", client.get("/readyz"))
    app.extensions["control"].pool.lease(None, exclude=["b", "c"])
    answer = client.delete("/backends/a")
    assert answer.status_code == 202
    assert_described(document, "DELETE", "/backends/{backend_id}", answer)


# Python's `$` also matches before a line feed at the end, that of JSON Schema does not.
SCHEMA_VALUES = [value for value in WRONG_VALUES if value[2] != {"id": "x\n"}]


@pytest.mark.parametrize(("method", "path", "body", "field"), SCHEMA_VALUES)
def test_what_is_refused_does_not_fit_the_description_either(
    document: dict[str, Any], method: str, path: str, body: dict[str, Any], field: str
) -> None:
    """Types and bounds in the description are those that are enforced. What a URL may be, no schema says."""
    template = "/backends/{backend_id}" if path == "/backends/a" else path
    content = document["paths"][template][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    if path == "/backends":
        body = {"url": "http://127.0.0.1:9"} | body
    assert not Draft202012Validator({"components": document["components"], **content}).is_valid(body)


# Real processes.


@pytest.fixture(scope="module")
def guarded() -> Iterator[BalancerProcess]:
    """A balancer with a token that logs all it can."""
    env = {"LB_ADMIN_TOKEN": TOKEN, "LB_CORS_ORIGINS": ALLOWED}
    balancer = BalancerProcess(f"--backend=b=http://127.0.0.1:{free_port()}", "--log-level=debug", env=env)
    yield balancer
    balancer.stop()


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


def test_a_preflight_on_a_real_connection(guarded: BalancerProcess) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    status, lines, _ = fetch(f"{guarded.url}/algorithm", method="OPTIONS", Origin=ALLOWED, **asked)
    assert (status, lines["access-control-allow-origin"]) == (200, ALLOWED)
    status, lines, _ = fetch(f"{guarded.url}/algorithm", method="OPTIONS", Origin=FOREIGN, **asked)
    assert "access-control-allow-origin" not in lines


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
    backend = WireBackend()
    backend.script = lambda sock, request: sock.sendall(ok(b"backend " + request.target))
    yield backend
    backend.close()


CONTROL_PATHS = ["/status", "/algorithm", "/reset", "/backends", "/backends/b", "/events", "/dashboard", "/readyz"]


def assert_forwarded(url: str) -> None:
    wait_until(lambda: fetch(f"{url}/anything")[0] == 200, what="the backend is up")
    for path in CONTROL_PATHS:
        assert fetch(url + path)[2] == b"backend " + path.encode()
    assert fetch(f"{url}/algorithm", {"algorithm": "round_robin"})[2] == b"backend /algorithm"


def test_with_a_prefix_the_bare_paths_belong_to_the_backend(own_paths: WireBackend) -> None:
    balancer = Balancer(f"--backend=b={own_paths.url}", "--control-prefix=/lb", wait_ready=False)
    try:
        assert_forwarded(balancer.url)
        control = f"{balancer.url}/lb"
        assert fetch_json(f"{control}/status")["statistics"]["total_requests"] > 0
        assert fetch_json(f"{control}/algorithm", {"algorithm": "round_robin"})["current"] == "round_robin"
        assert fetch(f"{control}/readyz")[0] == 200
        assert fetch(f"{control}/backends/nobody")[0] == 404
        location = fetch(f"{control}/backends", {"id": "n", "url": own_paths.url})[1]["location"]
        assert location.endswith("/lb/backends/n")
        assert fetch(f"{balancer.url}/lbstatus")[2] == b"backend /lbstatus"
        assert "content-security-policy" in fetch(f"{control}/dashboard")[1]
    finally:
        balancer.stop()


def test_with_a_port_of_its_own_the_control_api_is_nowhere_else(own_paths: WireBackend) -> None:
    port = free_port()
    balancer = BalancerProcess(f"--backend=b={own_paths.url}", f"--control-port={port}", wait_ready=False)
    try:
        assert_forwarded(balancer.url)
        control = f"http://127.0.0.1:{port}"
        assert fetch_json(f"{control}/status")["statistics"]["total_requests"] > 0
        assert fetch_json(f"{control}/algorithm", {"algorithm": "round_robin"})["current"] == "round_robin"
        status, _, body = fetch(f"{control}/anything")  # not forwarded from here
        assert status == 404 and json.loads(body)["error"]
        assert f"control API on {control}" in balancer.output
    finally:
        balancer.stop()
    assert balancer.wait() == 0


def test_a_path_that_only_looks_like_a_control_path_is_forwarded(own_paths: WireBackend) -> None:
    balancer = Balancer(f"--backend=b={own_paths.url}")
    try:
        for path in ("/status/", "/statuses", "/STATUS", "/api/status", "/health/x", "/dashboard.html", "//status"):
            assert fetch(balancer.url + path)[2] == b"backend " + path.encode()
        assert "lifecycle" in fetch_json(f"{balancer.url}/%73tatus")  # the same path in other letters
    finally:
        balancer.stop()


def test_not_ready_until_the_first_health_round_is_done() -> None:
    """A backend that accepts and never answers keeps the first round going for the health time-out."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        balancer = Balancer(f"--backend=silent={url}", "--health-timeout=4", wait_ready=False)
        try:
            status, _, body = fetch(f"{balancer.url}/readyz")
            assert (status, json.loads(body)["status"]) == (503, "not ready")
            assert fetch(f"{balancer.url}/health")[0] == 200
            wait_until(balancer.is_ready)
        finally:
            balancer.stop()

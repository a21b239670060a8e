"""The control API on Flask's own test client: an app that is wired but not started, and what its answers must have."""

from __future__ import annotations

import json
import time
from typing import Any

from flask import Flask
from support import make_attempt, make_record
from werkzeug.test import TestResponse

from balancer.balancing.backends import LastCheck
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.loadbalancer import create_app

ALGORITHMS = {"round_robin", "weighted", "least_connections", "power_of_two", "least_response_time", "peak_ewma"}
TOKEN, PAGE_TOKEN = "s3cret-t0ken-of-the-test", "an0ther-t0ken-for-pages"
ALLOWED, FOREIGN = "https://ops.example", "https://evil.example"
READS = ["/status", "/algorithm", "/backends", "/backends/a", "/requests/id-1", "/config", "/events", "/history"]
READS += ["/metrics", "/openapi.json", "/limits", "/cluster"]
WRITES = [("POST", "/algorithm"), ("POST", "/reset"), ("POST", "/backends"), ("PATCH", "/backends/a")]
WEIGHTS = (("a", 3), ("b", 2), ("c", 1))


Headers = dict[str, str]


def bearer(token: str) -> Headers:
    return {"Authorization": f"Bearer {token}"}


def make_app(**settings: Any) -> Flask:
    """An app that is wired but not started: no health checks run and nothing listens on the backends' port."""
    backends = tuple(BackendSettings(id=name, url="http://127.0.0.1:9", weight=weight) for name, weight in WEIGHTS)
    return create_app(Settings(**({"backends": backends} | settings)))


def check_all(app: Flask, error: str | None = None) -> None:
    """One round of health checks, all good or all failed with `error`."""
    pool = app.extensions["control"].pool
    for backend in pool.backends():
        pool.record_check(backend, LastCheck(time.time(), 0.003, 200 if error is None else None, error))


def add_records(app: Flask, count: int, status: int = 200) -> None:
    statistics = app.extensions["control"].statistics
    for number in range(count):
        statistics.begin()
        named = {"timestamp": time.time(), "path": f"/{number}", "request_id": f"id-{number}"}
        statistics.record(make_record("a", status, 0.012, attempts=[make_attempt("a", str(status))], **named))


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


# The contract: names of fields, by the type of their values.
NUMBER, COUNT, TEXT, FLAG = (int, float), int, str, bool
ANY_NUMBER, ANY_COUNT, ANY_TEXT = (int, float, type(None)), (int, type(None)), (str, type(None))


def fields(kind: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


CODES = fields(COUNT, "1xx 2xx 3xx 4xx 5xx")
COUNTERS = fields(COUNT, "total_requests successful_requests failed_requests aborted_requests")
COUNTERS |= {"latency": fields(ANY_NUMBER, "p50 p95 p99"), "codes": CODES}
STATISTICS = COUNTERS | fields(NUMBER, "start_time requests_per_second")
STATISTICS |= fields(COUNT, "active_requests queued_requests retries unassigned_requests")
LAST_CHECK = fields(NUMBER, "at duration") | {"status": ANY_COUNT, "error": ANY_TEXT}
HEALTH = {"status": TEXT, "reason": ANY_TEXT, "since": NUMBER, "last_check": LAST_CHECK}
HEALTH |= fields(COUNT, "fall rise consecutive_failures consecutive_successes")
BACKEND = COUNTERS | fields(TEXT, "id url state admin_state") | fields(COUNT, "active_connections weight")
BACKEND |= {"healthy": FLAG, "avg_response_time": NUMBER, "max_connections": ANY_COUNT, "expected_share": ANY_NUMBER}
RECENT = fields(NUMBER, "timestamp response_time") | fields(COUNT, "status attempts")
RECENT |= fields(TEXT, "method path request_id") | fields(ANY_TEXT, "server_id reason")
STATUS = fields(COUNT, "schema_version events_seq") | fields(TEXT, "version load_balancer_id algorithm lifecycle")
STATUS |= fields(NUMBER, "now uptime") | {"statistics": STATISTICS, "recent_requests": [RECENT]}
STATUS |= {"backend_servers": [BACKEND | {"health": HEALTH}]}
CAPABILITIES = fields(FLAG, "writes token_required authorized traffic")
STATUS |= {"capabilities": CAPABILITIES | {"algorithms": [fields(TEXT, "name description")]}}
WINDOW = fields(COUNT, "requests failed") | fields(ANY_NUMBER, "p50 p95 p99")
EVENT = fields(TEXT, "kind message severity") | {"seq": COUNT, "timestamp": NUMBER, "backend": ANY_TEXT}


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

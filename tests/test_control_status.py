"""GET /status, the probes, and GET /events."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from control import ALGORITHMS, EVENT, STATUS, WINDOW, add_records, assert_error, assert_shape, check_all, make_app
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import Client


def test_status_has_the_fields_and_types_of_the_contract(app: Flask, client: FlaskClient) -> None:
    check_all(app)
    add_records(app, 3)
    answer = client.get("/status")
    assert answer.status_code == 200 and answer.mimetype == "application/json"
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
    assert status["recent_requests"] == []
    assert status["statistics"]["latency"] == {"p50": None, "p95": None, "p99": None}
    first = status["backend_servers"][0]
    assert (first["state"], first["healthy"], first["health"]["last_check"]) == ("unknown", False, None)


def test_status_counts_successes_failures_and_unassigned() -> None:
    app = make_app(queue_timeout=0.1)
    client = app.test_client()
    add_records(app, 4)
    add_records(app, 2, status=502)
    assert client.get("/api/process").status_code == 503  # no backend is up
    status = client.get("/status").json
    whole = status["statistics"]
    assert (whole["total_requests"], whole["successful_requests"], whole["failed_requests"]) == (7, 4, 3)
    assert whole["unassigned_requests"] == 1
    assert whole["codes"] == {"1xx": 0, "2xx": 4, "3xx": 0, "4xx": 0, "5xx": 3}
    newest = status["recent_requests"][0]
    assert (newest["status"], newest["server_id"], newest["method"]) == (503, None, "GET")


def test_status_shows_why_a_backend_is_down(app: Flask, client: FlaskClient) -> None:
    check_all(app, "health check failed: refused")
    backend = client.get("/status").json["backend_servers"][0]
    assert (backend["healthy"], backend["state"], backend["health"]["status"]) == (False, "down", "down")
    assert backend["health"]["reason"] == "health check failed: refused"
    assert backend["health"]["consecutive_failures"] == 1


@pytest.mark.parametrize(
    ("query", "expected"), [("", 20), ("?recent=0", 0), ("?recent=1", 1), ("?recent=99", 99), ("?recent=100", 100)]
)
def test_recent_requests_newest_first_and_bounded(app: Flask, client: FlaskClient, query: str, expected: int) -> None:
    add_records(app, 130)
    recent = client.get(f"/status{query}").json["recent_requests"]
    assert [entry["path"] for entry in recent] == [f"/{number}" for number in range(129, 129 - expected, -1)]


@pytest.mark.parametrize("value", ["101", "-1", "x", "", "1.5", "1e1", "9" * 400, "%D9%A3", "NaN"])
def test_recent_out_of_bounds_is_refused_with_the_bounds(client: FlaskClient, value: str) -> None:
    assert_error(client.get(f"/status?recent={value}"), 400, "recent", "0", "100")


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


def test_events_have_a_rising_seq_and_can_be_asked_for_from_one_on(app: Flask, client: FlaskClient) -> None:
    check_all(app)
    client.patch("/backends/a", json={"weight": 9})
    client.post("/reset")
    everything = client.get("/events").json
    seqs = [event["seq"] for event in everything["events"]]
    assert seqs == list(range(1, len(seqs) + 1)) and everything["latest"] == seqs[-1]
    assert client.get("/status").json["events_seq"] == seqs[-1]
    newer = client.get(f"/events?since={seqs[-2]}").json
    assert newer["events"] == everything["events"][-1:] and newer["latest"] == seqs[-1]
    nothing = client.get(f"/events?since={seqs[-1]}").json
    assert nothing == {"events": [], "latest": seqs[-1]}
    assert_shape(everything["events"][0], EVENT, "event")


def test_the_newest_500_events_are_kept(app: Flask, client: FlaskClient) -> None:
    for number in range(510):
        app.extensions["control"].events.add("made_up", None, str(number))
    kept = client.get("/events?since=0").json
    assert [event["message"] for event in kept["events"]] == [str(number) for number in range(10, 510)]


@pytest.mark.parametrize("value", ["-1", "x", "", "1.5", "9" * 30])
def test_a_wrong_since_is_refused(client: FlaskClient, value: str) -> None:
    assert_error(client.get(f"/events?since={value}"), 400, "since")


def test_the_figures_of_a_window_come_with_it(app: Flask, client: FlaskClient) -> None:
    app.extensions["control"].history.look()
    add_records(app, 3)
    app.extensions["control"].history.look()
    answer = client.get("/status?window=60").json
    assert_shape(answer["statistics"]["window"], WINDOW | {"seconds": int})
    assert_shape(answer["backend_servers"][0]["window"], WINDOW)
    assert answer["backend_servers"][0]["window"]["requests"] == answer["statistics"]["window"]["requests"] == 3
    assert answer["backend_servers"][1]["window"] is client.get("/status").json["statistics"]["window"] is None
    assert_error(client.get("/status?window=61"), 400, "window=61", "10, 60, 300")


# Packed for who asks for it: with 60 backends a page was sent 63 KB a second.


@pytest.mark.parametrize("path", ["/status", "/history", "/dashboard"])
def test_large_answers_are_packed_for_who_takes_gzip(path: str) -> None:
    app = make_app()
    add_records(app, 20)
    client = app.test_client()
    plain, refused, packed = (
        client.get(path, headers=headers)
        for headers in ({}, {"Accept-Encoding": "br, gzip;q=0"}, {"Accept-Encoding": "br, gzip;q=0.5"})
    )
    assert all("Accept-Encoding" in answer.vary for answer in (plain, packed))
    assert "Content-Encoding" not in plain.headers and "Content-Encoding" not in refused.headers
    if path == "/history":  # nothing has happened yet: too short to be worth it
        assert "Content-Encoding" not in packed.headers
        return
    assert packed.headers["Content-Encoding"] == "gzip"
    assert packed.content_length == len(packed.data) < len(plain.data) / 2
    unpacked = gzip.decompress(packed.data)
    assert unpacked == plain.data if path == "/dashboard" else json.loads(unpacked).keys() == plain.get_json().keys()

"""What the control API changes: the algorithm, the statistics, the backends."""

from __future__ import annotations

from typing import Any

import pytest
from control import ALGORITHMS, WEIGHTS, add_records, assert_error, check_all, events, state
from flask import Flask
from flask.testing import FlaskClient


def test_algorithms_are_listed_with_a_paragraph_each(client: FlaskClient) -> None:
    answer = client.get("/algorithm").json
    assert answer["current"] == "weighted"
    assert {entry["name"] for entry in answer["algorithms"]} >= ALGORITHMS
    assert all(len(entry["description"]) > 40 for entry in answer["algorithms"])


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_switching_the_algorithm(app: Flask, client: FlaskClient, name: str) -> None:
    answer = client.post("/algorithm", json={"algorithm": name})
    assert answer.status_code == 200
    assert answer.json is not None and answer.json["current"] == name and name in answer.json["message"]
    assert client.get("/algorithm").json["current"] == name
    assert client.get("/status").json["algorithm"] == name


def test_blanks_around_an_algorithm_are_not_part_of_it(client: FlaskClient) -> None:
    assert client.post("/algorithm", json={"algorithm": "round_robin "}).json["current"] == "round_robin"


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


@pytest.mark.parametrize("body", [None, b"", b"{}"])
def test_reset_zeroes_the_statistics(app: Flask, client: FlaskClient, body: bytes | None) -> None:
    """Without a body and without a Content-Type too, as `curl -X POST` sends it."""
    add_records(app, 5)
    before = client.get("/status").json["statistics"]["start_time"]
    content_type = "application/json" if body else None
    answer = client.post("/reset", data=body, content_type=content_type)
    assert answer.status_code == 200 and answer.json is not None and answer.json["message"]
    status = client.get("/status").json
    assert status["statistics"]["total_requests"] == 0
    assert status["statistics"]["start_time"] >= before
    assert status["recent_requests"] == []
    assert status["backend_servers"][0]["total_requests"] == 0
    assert status["backend_servers"][0]["weight"] == 3  # configuration stays
    assert events(app)[-1]["kind"] == "statistics_reset"


def test_backends_are_listed_in_configured_order(client: FlaskClient) -> None:
    listed = client.get("/backends").json["backends"]
    assert [(backend["id"], backend["weight"]) for backend in listed] == list(WEIGHTS)
    assert client.get("/backends/b").json == listed[1]


def test_adding_a_backend(app: Flask, client: FlaskClient) -> None:
    wanted = {"id": "new-1", "url": "http://127.0.0.1:8080", "weight": 7, "max_connections": 20}
    answer = client.post("/backends", json=wanted)
    assert answer.status_code == 201
    assert answer.headers["Location"] == "backends/new-1"
    assert {name: answer.json[name] for name in wanted} == wanted
    assert (answer.json["healthy"], answer.json["state"]) == (False, "unknown")
    assert client.get("/backends/new-1").json == answer.json
    assert (events(app)[-1]["kind"], events(app)[-1]["backend"]) == ("backend_added", "new-1")


def test_adding_a_backend_by_url_alone_chooses_a_free_id(client: FlaskClient) -> None:
    ids = [client.post("/backends", json={"url": "http://127.0.0.1:8080"}).json["id"] for _ in range(3)]
    assert len({*ids, "a", "b", "c"}) == 6
    assert client.post("/backends", json={"url": "https://backend.example"}).json["url"] == (
        "https://backend.example:443"
    )


def test_a_taken_id_is_a_conflict(app: Flask, client: FlaskClient) -> None:
    before = state(app)
    assert_error(client.post("/backends", json={"id": "a", "url": "http://127.0.0.1:8080"}), 409, "'a'")
    assert state(app) == before


@pytest.mark.parametrize("url", ["", "javascript:alert(1)", "http://127.0.0.1/path", "http://a\r\nHost: b"])
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
        return [backend["expected_share"] for backend in client.get("/backends").json["backends"]]

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
    assert [backend["id"] for backend in client.get("/backends").json["backends"]] == ["a", "c"]
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
    assert client.get("/status").json["backend_servers"][0]["total_requests"] == 0


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("name", ["nobody", "A", "%00", "a%20", "%C3%A4", "a%2Fb", "x" * 3000])
def test_an_unknown_backend_is_not_found(app: Flask, client: FlaskClient, method: str, name: str) -> None:
    before = state(app)
    body = {"json": {"weight": 1}} if method == "PATCH" else {}
    error = assert_error(client.open(f"/backends/{name}", method=method, **body), 404)
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

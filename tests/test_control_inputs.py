"""What the control API refuses, in words that say what it accepts; and its description, which says the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from control import WRITES, assert_error, events, state
from flask import Flask
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator

FIELDS = {"/algorithm": "algorithm", "/reset": "no fields", "/backends": "url", "/backends/a": "weight"}
UNREADABLE = {
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
TOO_LONG = {"100 kB": b'{"algorithm": "' + b"x" * 100_000 + b'"}'}
BODIES = {
    name: (body, status, word)
    for bodies, status, word in ((UNREADABLE, 400, "JSON"), (NOT_AN_OBJECT, 400, "object"), (TOO_LONG, 413, "65536"))
    for name, body in bodies.items()
} | {"a name twice": (b'{"a": 1, "b": 2, "a": 1}', 400, "'a' twice")}


@pytest.fixture(autouse=True)
def untouched(app: Flask) -> Iterator[None]:
    """What is refused changes nothing, not even half of it."""
    before = state(app), events(app)
    yield
    assert (state(app), events(app)) == before


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize(("body", "status", "word"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_object_is_refused(
    client: FlaskClient, method: str, path: str, body: bytes, status: int, word: str
) -> None:
    answer = client.open(path, method=method, data=body, content_type="application/json")
    assert len(assert_error(answer, status, word)["error"]) < 1000


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_unknown_and_missing_fields_are_refused_and_the_known_ones_named(
    client: FlaskClient, method: str, path: str
) -> None:
    valid = {"/algorithm": {"algorithm": "round_robin"}, "/backends": {"url": "http://127.0.0.1:9"}}.get(path, {})
    answer = client.open(path, method=method, json={**valid, "colour": "red"})
    assert_error(answer, 400 if path in ("/algorithm", "/reset") else 422, "colour", FIELDS[path])
    for body in (b"", b"{}") if path != "/reset" else ():
        answer = client.open(path, method=method, data=body, content_type="application/json")
        assert_error(answer, 400 if path == "/algorithm" else 422, FIELDS[path])


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
def test_a_wrong_value_is_refused_and_named_and_does_not_fit_the_description(
    client: FlaskClient, document: dict[str, Any], method: str, path: str, body: dict[str, Any], field: str
) -> None:
    """Types and bounds in the description are those that are enforced. What a URL may be, no schema says."""
    if path == "/backends":
        body = {"url": "http://127.0.0.1:9"} | body
    assert_error(client.open(path, method=method, json=body), 400 if path == "/algorithm" else 422, field)
    template = "/backends/{backend_id}" if path == "/backends/a" else path
    content = document["paths"][template][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    fits = Draft202012Validator({"components": document["components"], **content}).is_valid(body)
    assert fits is (body.get("id") == "x\n")  # before a line feed at the end Python's `$` matches, JSON Schema's not


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/algorithm", {}, "algorithm: is missing; expected name from GET /algorithm (fields: algorithm,"),
        ("POST", "/algorithm", {"algorithm": 3}, "algorithm = 3: expected text: name from GET /algorithm"),
        ("POST", "/reset", {"x": 1}, "unknown field 'x' (fields: no fields)"),
        ("PATCH", "/backends/a", {"weight": 257}, "weight = 257: expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"weight": True}, "weight = true: expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"weight": "3"}, "weight = '3': expected a whole number from 0 to 256"),
        ("PATCH", "/backends/a", {"max_connections": 0}, "max_connections = 0: expected a whole number from 1 to "),
        ("PATCH", "/backends/a", {"admin_state": "off"}, "admin_state = 'off': expected ready, drain or maint"),
        ("POST", "/backends", {"url": "http://x", "id": "a b"}, "id = 'a b': expected up to 64 letters"),
        ("POST", "/backends", {"url": "http://u:pa55word@" + "x" * 300}, "url = (hidden): expected text of at most"),
        ("POST", "/backends", {"url": None}, "url = null: expected text of at most 300"),
        ("POST", "/backends", {"url": 3}, "url = 3: expected text of at most 300 characters: http://HOST:PORT or "),
    ],
)
def test_a_refusal_says_what_is_accepted(
    client: FlaskClient, method: str, path: str, body: dict[str, Any], said: str
) -> None:
    assert said in client.open(path, method=method, json=body).json["error"]


def test_errors_of_new_paths_are_problem_details_and_those_of_old_paths_plain_json(client: FlaskClient) -> None:
    answer = client.get("/backends/nobody")
    assert answer.mimetype == "application/problem+json"
    assert answer.json["status"] == 404 and answer.json["title"] and answer.json["detail"] == answer.json["error"]
    assert client.post("/algorithm", json={"algorithm": "x"}).mimetype == "application/json"
    assert client.get("/status?recent=x").mimetype == "application/json"

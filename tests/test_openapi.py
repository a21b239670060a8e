"""The description of the control API is true."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest
from control import TOKEN, add_records, check_all, make_app
from flask import Flask
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from werkzeug.test import TestResponse


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
    ("POST", "/backends/{backend_id}/faults", "/backends/a/faults", {"hang": True}, 404),
    ("DELETE", "/backends/{backend_id}/faults", "/backends/a/faults", {}, 404),
    ("GET", "/requests/{request_id}", "/requests/id-1", None, 200),
    ("GET", "/requests/{request_id}", "/requests/id-9", None, 404),
    ("GET", "/limits", "/limits", None, 200),
    ("GET", "/cluster", "/cluster", None, 200),
    ("GET", "/limits/{name}", "/limits/per_client?key=192.0.2.1", None, 200),
    ("GET", "/limits/{name}", "/limits/per_client", None, 400),
    ("GET", "/limits/{name}", "/limits/x", None, 404),
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
    app = make_app(limits=[{"name": "per_client", "rate": "100/m", "in_flight": 10}])
    if path != "/readyz":
        check_all(app)
    add_records(app, 3)
    add_records(app, 1, status=502)
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

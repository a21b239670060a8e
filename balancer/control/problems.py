"""Error answers of the control API: always JSON, always with `error`, which says what is wrong and what to do.

New paths answer in the problem details of RFC 9457. The earlier program's clients know `application/json` alone, and
get that on its paths.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from flask import Flask, Response, current_app, jsonify, request
from typing_extensions import TypedDict
from werkzeug.exceptions import HTTPException

from balancer.errors import ClientError, ClientGone

# Paths of the earlier program, whose clients expect application/json on errors too.
LEGACY_PATHS = frozenset({"/status", "/health", "/algorithm", "/reset"})


class Error(TypedDict):
    error: str


class ApiError(Exception):
    """Answered as JSON with `error`; `more` are further fields."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.more = more


def install(app: Flask) -> None:
    """Answer the errors of `app`, also where no route is: an unknown path, a method that a path has not."""
    app.register_error_handler(ApiError, lambda error: _problem(error.status, str(error), error.headers, **error.more))
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(ClientError, _client_failed)
    app.register_error_handler(ClientGone, _client_failed)


def is_legacy() -> bool:
    """Whether the request is for a path of the earlier program."""
    return request.path.removeprefix(current_app.config["CONTROL_PREFIX"]) in LEGACY_PATHS


def _http_error(error: HTTPException) -> Response:
    allow = getattr(error, "valid_methods", None)
    headers = {"Allow": ", ".join(sorted(allow))} if allow else {}
    return _problem(error.code or 500, error.description or error.name, headers)


def _client_failed(error: ClientError | ClientGone) -> Response:
    """The body did not come, or not in time: raised where a view reads it."""
    return _problem(400 if isinstance(error, ClientGone) else error.status, str(error), {})


def _problem(status_code: int, message: str, headers: dict[str, str], **more: Any) -> Response:
    """RFC 9457 on new paths; `error` is on every one, because the earlier program's clients read it."""
    body: dict[str, Any] = {"error": message, **more}
    if not is_legacy():
        body |= {
            "type": "about:blank",
            "title": HTTPStatus(status_code).phrase,
            "status": status_code,
            "detail": message,
        }
    response = jsonify(body)
    response.status_code = status_code
    response.headers.update(headers)
    if not is_legacy():
        response.mimetype = "application/problem+json"
    return response

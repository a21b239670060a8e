"""The control API put together: which paths are its own, and what holds for every route.

Reads are open and hold no secrets; `guard` decides about writes. The routes are in `monitoring`, `administration` and
`dashboard`; a new path also goes into `openapi.PATHS`, else it is forwarded.
"""

from __future__ import annotations

from collections.abc import Callable

from flask import Blueprint, Flask, Response, request
from flask_cors import CORS

from balancer import administration, dashboard, monitoring, openapi, problems
from balancer.control import Control, current_control
from balancer.events import REFUSED
from balancer.guard import WriteGuard, current_guard
from balancer.inputs import MAX_BODY
from balancer.problems import ApiError

# The routes are nested in it, so that its hooks below hold for all of them and for nothing else.
blueprint = Blueprint("control", __name__)
for part in (monitoring, administration, dashboard):
    blueprint.register_blueprint(part.blueprint)


def is_control_path(prefix: str) -> Callable[[str], bool]:
    """A predicate for the data path: is this path answered here instead of being forwarded?"""
    exact = frozenset(prefix + path for path in openapi.PATHS if "{" not in path)
    below = tuple(prefix + path.partition("{")[0] for path in openapi.PATHS if "{" in path)
    return lambda path: path in exact or path.startswith(below)


def install(app: Flask, control: Control, guard: WriteGuard) -> None:
    """Put the control API into `app`."""
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY + 1  # one more, because Werkzeug cuts a chunked body without a word
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.extensions["control"] = control
    app.extensions["write_guard"] = guard
    app.register_blueprint(blueprint, url_prefix=control.prefix or None)
    problems.install(app)
    # Reads have no secrets, so a page from disk may read; `WriteGuard` decides about writes by itself.
    CORS(
        app,
        origins=["null", *sorted(guard.origins)],
        allow_headers=["Content-Type", "Authorization"],
        methods=["GET", "POST", "PATCH", "DELETE"],
        max_age=600,
    )


@blueprint.before_request
def _guard_writes() -> None:
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    try:
        current_guard().check()
    except ApiError as error:
        current_control().events.add(REFUSED, None, f"{request.method} {request.path[:200]}: {error}", "warning")
        raise


@blueprint.after_request
def _count(response: Response) -> Response:
    action = (request.endpoint or "").rpartition(".")[2]
    current_control().metrics.admin_requests.labels(action, response.status_code).inc()
    return response

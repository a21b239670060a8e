"""The control API: a Flask blueprint over the pool, the statistics and the events.

Reads are open and hold no secrets; `guard` decides about writes. Bodies are checked by the models in this module, which
`openapi` describes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from flask import Blueprint, Flask, Response, current_app, jsonify, request
from flask_cors import CORS
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from balancer import __version__, openapi, strategies, wording
from balancer.backends import AdminState
from balancer.errors import ClientError, ClientGone, SettingsError
from balancer.events import REFUSED, Events
from balancer.guard import ApiError, WriteGuard
from balancer.history import SLOTS, History
from balancer.logwriter import LogWriter
from balancer.metrics import Metrics
from balancer.origin import Origin
from balancer.pool import BackendPool
from balancer.reload import Configuration, Plan
from balancer.settings import MaxConnections, Weight
from balancer.statistics import NO_REQUESTS, Statistics

SCHEMA_VERSION = 1
MAX_BODY = 65536  # bytes of a control request
MAX_RECENT = 100
# Paths of the earlier program, whose clients expect application/json on errors too.
LEGACY_PATHS = frozenset({"/status", "/health", "/algorithm", "/reset"})

Lifecycle = Literal["starting", "running", "draining"]


class Body(BaseModel):
    """Base of all request bodies: no unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AlgorithmChange(Body):
    algorithm: str = Field(description="name from GET /algorithm")


class Nothing(Body):
    """An empty object."""


class BackendCreate(Body):
    id: str | None = Field(None, pattern=wording.ID, description="unique name; chosen if left out")
    url: str = Field(max_length=300, description="http://HOST:PORT or https://HOST:PORT")
    weight: Weight = 1
    max_connections: MaxConnections | None = None


class BackendChange(Body):
    weight: Weight | None = None
    max_connections: MaxConnections | None = Field(None, description="null for no limit")
    admin_state: AdminState | None = None


@dataclass(slots=True)
class Control:
    """What the control API acts on. `lifecycle` is set when serving starts and ends, everything else locks itself."""

    balancer_id: str
    pool: BackendPool
    statistics: Statistics
    events: Events
    history: History
    log: LogWriter
    metrics: Metrics = field(init=False)  # reads the others, so it comes last
    dashboard: Path
    configuration: Configuration
    prefix: str = ""
    queued: Callable[[], int] = lambda: 0
    reload: Callable[[bool], Plan] = field(init=False)  # True only asks what it would do
    lifecycle: Lifecycle = "starting"
    started: float = field(default_factory=time.monotonic)

    def is_serving(self) -> bool:
        """Ready for traffic: the first round of health checks is done, and no shutdown is under way."""
        return self.lifecycle != "draining" and self.pool.has_had_first_round()


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
    # Reads have no secrets, so a page from disk may read; `WriteGuard` decides about writes by itself.
    CORS(
        app,
        origins=["null", *sorted(guard.origins)],
        allow_headers=["Content-Type", "Authorization"],
        methods=["GET", "POST", "PATCH", "DELETE"],
        max_age=600,
    )


blueprint = Blueprint("control", __name__)


def _control() -> Control:
    return cast(Control, current_app.extensions["control"])


# Guarding and parsing.


@blueprint.before_request
def _guard_writes() -> None:
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    try:
        cast(WriteGuard, current_app.extensions["write_guard"]).check()
    except ApiError as error:
        _control().events.add(REFUSED, None, f"{request.method} {request.path[:200]}: {error}", "warning")
        raise


M = TypeVar("M", bound=Body)


def _body(model: type[M]) -> M:
    """The request body as `model`. Raises ApiError 400 for what is not JSON, 422 for a wrong value."""
    try:
        data = request.get_data()
    except RequestEntityTooLarge:
        data = None
    if data is None or len(data) > MAX_BODY:
        raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
    try:
        given = json.loads(data, parse_constant=_refuse_constant) if data else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"expected a JSON object, not {type(given).__name__}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "no fields"
        details = "; ".join(_explain(detail, model) for detail in error.errors(include_url=False))
        raise ApiError(_validation_status(), f"{details} (fields: {known})"[:1000]) from None


def _validation_status() -> int:
    """422 for a wrong value; 400 on the paths of the earlier program, whose clients know only that."""
    return 400 if _legacy() else 422


def _explain(detail: Any, model: type[Body]) -> str:
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"unknown field {name[:80]!r}"
    value = "" if detail["type"] == "missing" else f" = {wording.shown(detail['input'], hide=name == 'url')}"
    return f"{name}{value}: {wording.complaint(detail, model)}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _whole_number(name: str, default: int, maximum: int) -> int:
    """A query parameter from 0 to `maximum`. Raises ApiError 400."""
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) > maximum:
        raise ApiError(400, f"{name}={text[:40]!r}: expected a whole number from 0 to {maximum}")
    return int(text)


# Reading.


@blueprint.get("/status")
def status() -> Response:
    control = _control()
    recent = _whole_number("recent", 20, MAX_RECENT)
    whole, by_backend, newest = control.statistics.snapshot(recent)
    backends = [by_backend.get(backend["id"], NO_REQUESTS) | backend for backend in control.pool.snapshot()]
    whole["queued_requests"] = control.queued()
    whole["access_log_dropped"] = control.log.dropped
    whole["waiting_requests"] = control.pool.waiting
    shown = {backend["id"] for backend in backends}
    whole["unassigned_requests"] = sum(c["total_requests"] for key, c in by_backend.items() if key not in shown)
    now = time.time()
    return jsonify(
        {
            "schema_version": SCHEMA_VERSION,
            "version": __version__,
            "load_balancer_id": control.balancer_id,
            "algorithm": control.pool.algorithm,
            "lifecycle": control.lifecycle,
            "now": now,
            "uptime": time.monotonic() - control.started,
            "events_seq": control.events.latest,
            "panic": control.pool.is_panicking,
            "config": control.configuration.summary(),
            "statistics": whole,
            "backend_servers": backends,
            "recent_requests": newest,
            "capabilities": _capabilities(),
        }
    )


def _capabilities() -> dict[str, Any]:
    guard = cast(WriteGuard, current_app.extensions["write_guard"])
    return {
        "writes": guard.token is not None or guard.is_loopback,
        "token_required": guard.token is not None,
        "reload": _control().configuration.file is not None,
        "traffic": _control().configuration.settings.control_port is None,  # a port of its own forwards nothing
        "algorithms": _algorithms(),
    }


def _algorithms() -> list[dict[str, str]]:
    return [{"name": name, "description": cls.description()} for name, cls in strategies.REGISTRY.items()]


@blueprint.get("/health")
@blueprint.get("/livez")
def health() -> Response:
    return jsonify({"status": "healthy", "load_balancer_id": _control().balancer_id})


@blueprint.get("/readyz")
def ready() -> tuple[Response, int]:
    control = _control()
    is_ready = control.is_serving()
    answer = {"status": "ready" if is_ready else "not ready", "lifecycle": control.lifecycle}
    return jsonify(answer), 200 if is_ready else 503


@blueprint.get("/requests/<path:request_id>")
def explain_request(request_id: str) -> Response:
    exchange = _control().statistics.find(request_id)
    if exchange is None:
        kept = "kept are the newest, the newest that failed or were retried, and a sample of all others"
        raise ApiError(404, f"no finished request {request_id[:128]!r}; {kept}")
    return jsonify(exchange.explain())


@blueprint.get("/config")
def show_configuration() -> Response:
    control = _control()
    return jsonify(control.configuration.describe(control.pool.algorithm))


@blueprint.get("/events")
def events() -> Response:
    newer, latest = _control().events.since(_whole_number("since", 0, 10**15))
    return jsonify({"events": newer, "latest": latest})


@blueprint.get("/metrics")
def metrics() -> Response:
    environ = request.environ | {"REQUEST_METHOD": "GET"}  # its own app does not know HEAD; Flask drops the body
    return cast(Response, Response.from_app(_control().metrics.app, environ, buffered=True))


@blueprint.after_request
def _count(response: Response) -> Response:
    action = (request.endpoint or "").rpartition(".")[2]
    _control().metrics.admin_requests.labels(action, response.status_code).inc()
    return response


@blueprint.get("/history")
def history() -> Response:
    step, since = _whole_number("step", 1, 10**6), _whole_number("since", 0, 10**15)
    if step not in SLOTS:
        raise ApiError(400, f"step={step}: expected one of {', '.join(map(str, SLOTS))}")
    return jsonify({"step": step, "now": time.time(), "points": _control().history.since(step, since)})


@blueprint.get("/openapi.json")
def describe_api() -> Response:
    guard = cast(WriteGuard, current_app.extensions["write_guard"])
    return jsonify(openapi.document(_control().prefix, guard.token is not None))


@blueprint.get("/dashboard")
def dashboard() -> Response:
    try:
        page = _control().dashboard.read_bytes()
    except OSError as error:
        raise ApiError(404, f"dashboard.html is not there: {error.strerror}") from None
    response = Response(page, mimetype="text/html")
    response.headers["Content-Security-Policy"] = content_security_policy(page)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-cache"
    return response


def content_security_policy(page: bytes) -> str:
    """Only what the page itself brings may run, by hash, and it may talk to nobody but us."""
    scripts, styles = (
        " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts) or "'none'"
        for texts in (re.findall(rb"<%s[^>]*>(.*?)</%s>" % (tag, tag), page, re.S) for tag in (b"script", b"style"))
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src data:; connect-src 'self'; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


# The algorithm and the statistics.


@blueprint.get("/algorithm")
def show_algorithm() -> Response:
    return jsonify({"current": _control().pool.algorithm, "algorithms": _algorithms()})


@blueprint.post("/algorithm")
def change_algorithm() -> Response:
    name = _body(AlgorithmChange).algorithm.strip()
    if name not in strategies.REGISTRY:
        raise ApiError(400, f"unknown algorithm {name[:80]!r}", valid_options=list(strategies.REGISTRY))
    control = _control()
    if name == control.pool.algorithm:
        return jsonify({"message": f"{name} is already in use", "current": name})
    control.pool.use(strategies.create(name))
    return jsonify({"message": f"algorithm changed to {name}", "current": name})


@blueprint.post("/reset")
def reset() -> Response:
    _body(Nothing)
    control = _control()
    control.statistics.reset()
    control.history.clear()
    control.events.add("statistics_reset", None, "statistics, history and recent requests were reset")
    return jsonify({"message": "statistics reset"})


@blueprint.post("/reload")
def reload() -> Response:
    _body(Nothing)
    if unknown := sorted(set(request.args) - {"dry_run"}):  # a slip of the pen must not become the real thing
        raise ApiError(400, f"unknown parameter {unknown[0][:40]!r}; there is dry_run=1")
    dry_run = _whole_number("dry_run", 0, 1) == 1
    try:
        plan = _control().reload(dry_run)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    return jsonify(plan.describe(applied=not dry_run))


# Backends.


@blueprint.get("/backends")
def list_backends() -> Response:
    return jsonify({"backends": _control().pool.snapshot()})


@blueprint.post("/backends")
def add_backend() -> tuple[Response, int, dict[str, str]]:
    wanted = _body(BackendCreate)
    control = _control()
    try:
        origin = Origin.parse(wanted.url)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    try:
        backend = control.pool.add(wanted.id, origin, weight=wanted.weight, max_connections=wanted.max_connections)
    except SettingsError as error:
        raise ApiError(409, str(error)) from None
    return jsonify(_describe(backend.id)), 201, {"Location": f"{request.path}/{backend.id}"}


@blueprint.get("/backends/<backend_id>")
def show_backend(backend_id: str) -> Response:
    return jsonify(_describe(backend_id))


@blueprint.patch("/backends/<backend_id>")
def change_backend(backend_id: str) -> Response:
    changes = _body(BackendChange).model_dump(exclude_unset=True)
    if not changes:
        raise ApiError(422, f"nothing to change; give one of: {', '.join(BackendChange.model_fields)}")
    for name in ("weight", "admin_state"):
        if name in changes and changes[name] is None:
            raise ApiError(422, f"{name}: must not be null")
    try:
        _control().pool.update(backend_id, changes)
    except KeyError:
        raise _unknown(backend_id) from None
    return jsonify(_describe(backend_id))


@blueprint.delete("/backends/<backend_id>")
def remove_backend(backend_id: str) -> tuple[Response, int]:
    try:
        active = _control().pool.remove(backend_id)
    except KeyError:
        raise _unknown(backend_id) from None
    if active:
        return jsonify({"message": f"{backend_id} is removed when its requests have ended", "active": active}), 202
    return jsonify({"message": f"{backend_id} removed", "active": 0}), 200


def _describe(backend_id: str) -> dict[str, Any]:
    for backend in _control().pool.snapshot():
        if backend["id"] == backend_id:
            return backend
    raise _unknown(backend_id)


def _unknown(backend_id: str) -> ApiError:
    known = [backend["id"] for backend in _control().pool.snapshot()]
    return ApiError(404, f"no backend {backend_id[:80]!r}", valid_options=known)


# Errors.


def _legacy() -> bool:
    return request.path.removeprefix(_control().prefix) in LEGACY_PATHS


@blueprint.errorhandler(ApiError)
def _api_error(error: ApiError) -> Response:
    return _problem(error.status, str(error), error.headers, **error.more)


@blueprint.app_errorhandler(HTTPException)
def _http_error(error: HTTPException) -> Response:
    allow = getattr(error, "valid_methods", None)
    headers = {"Allow": ", ".join(sorted(allow))} if allow else {}
    return _problem(error.code or 500, error.description or error.name, headers)


@blueprint.app_errorhandler(ClientError)
@blueprint.app_errorhandler(ClientGone)
def _client_failed(error: ClientError | ClientGone) -> Response:
    """The body did not come, or not in time: raised where a view reads it."""
    return _problem(400 if isinstance(error, ClientGone) else error.status, str(error), {})


def _problem(status_code: int, message: str, headers: dict[str, str], **more: Any) -> Response:
    """RFC 9457 on new paths; `error` is on every one, because the earlier program's clients read it."""
    body: dict[str, Any] = {"error": message, **more}
    if not _legacy():
        body |= {
            "type": "about:blank",
            "title": HTTPStatus(status_code).phrase,
            "status": status_code,
            "detail": message,
        }
    response = jsonify(body)
    response.status_code = status_code
    response.headers.update(headers)
    if not _legacy():
        response.mimetype = "application/problem+json"
    return response

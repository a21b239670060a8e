"""Routes that only tell: how it goes now and went before, the settings in force, what the API offers.

No secret may be in an answer. A reader without a token gets no more of paths than may be seen by everybody on this
machine: of requests the first segment, of files the name.
"""

from __future__ import annotations

import time
from typing import Any, cast

from flask import Blueprint, Response, jsonify, request

from balancer import __version__
from balancer.balancing import strategies
from balancer.control import openapi
from balancer.control.access import first_segment, is_authorized
from balancer.control.control import current_control
from balancer.control.inputs import whole_number
from balancer.control.problems import ApiError
from balancer.observe.history import SLOTS
from balancer.observe.statistics import NO_REQUESTS

SCHEMA_VERSION = 1
MAX_RECENT = 100

blueprint = Blueprint("monitoring", __name__)


@blueprint.get("/status")
def status() -> Response:
    control = current_control()
    recent = whole_number("recent", 20, MAX_RECENT)
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
            "config": control.configuration.summary(is_authorized()),
            "statistics": whole,
            "backend_servers": backends,
            "recent_requests": [_shown(record) for record in newest],
            "capabilities": _capabilities(),
        }
    )


def _shown(record: dict[str, Any]) -> dict[str, Any]:
    return record if is_authorized() else record | {"path": first_segment(record["path"])}


def _capabilities() -> dict[str, Any]:
    access = current_control().access
    return {
        "writes": access.may_write(),
        "token_required": access.has_tokens,
        "authorized": is_authorized(),
        "reload": current_control().configuration.file is not None,
        "traffic": current_control().configuration.settings.control_port is None,  # a port of its own forwards nothing
        "algorithms": strategies.describe(),
    }


@blueprint.get("/health")
@blueprint.get("/livez")
def health() -> Response:
    return jsonify({"status": "healthy", "load_balancer_id": current_control().balancer_id})


@blueprint.get("/readyz")
def ready() -> tuple[Response, int]:
    control = current_control()
    is_ready = control.is_serving()
    answer = {"status": "ready" if is_ready else "not ready", "lifecycle": control.lifecycle}
    return jsonify(answer), 200 if is_ready else 503


@blueprint.get("/requests/<path:request_id>")
def explain_request(request_id: str) -> Response:
    record = current_control().statistics.find(request_id)
    if record is None:
        kept = "kept are the newest, the newest that failed or were retried, and a sample of all others"
        raise ApiError(404, f"no finished request {request_id[:128]!r}; {kept}")
    return jsonify(_shown(record.explain()))


@blueprint.get("/config")
def show_configuration() -> Response:
    control = current_control()
    return jsonify(control.configuration.describe(control.pool.algorithm, is_authorized()))


@blueprint.get("/events")
def events() -> Response:
    newer, latest = current_control().events.since(whole_number("since", 0, 10**15), is_authorized())
    return jsonify({"events": newer, "latest": latest})


@blueprint.get("/metrics")
def metrics() -> Response:
    environ = request.environ | {"REQUEST_METHOD": "GET"}  # its own app does not know HEAD; Flask drops the body
    return cast(Response, Response.from_app(current_control().metrics.app, environ, buffered=True))


@blueprint.get("/history")
def history() -> Response:
    step, since = whole_number("step", 1, 10**6), whole_number("since", 0, 10**15)
    if step not in SLOTS:
        raise ApiError(400, f"step={step}: expected one of {', '.join(map(str, SLOTS))}")
    return jsonify({"step": step, "now": time.time(), "points": current_control().history.since(step, since)})


@blueprint.get("/openapi.json")
def describe_api() -> Response:
    control = current_control()
    return jsonify(openapi.document(control.prefix, control.access.has_tokens))

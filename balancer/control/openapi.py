"""The OpenAPI 3.1 description of the control API, served at `/openapi.json`.

`PATHS` is the one list of control paths: the data path forwards everything that is not on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Response, jsonify

from balancer import __version__
from balancer.config.comparison import PlanView
from balancer.config.reload import SettingsView
from balancer.control.administration import AlgorithmChanged, Algorithms, BackendRemoved, Backends, Message
from balancer.control.cluster import ClusterView
from balancer.control.control import ManagedView, current_control
from balancer.control.inputs import AlgorithmChange, Anything, BackendChange, BackendCreate, Body, Nothing
from balancer.control.limits import LimitsView
from balancer.control.monitoring import MAX_RECENT, Alive, EventsView, HistoryView, Readiness, Status
from balancer.control.problems import Error
from balancer.control.schemas import Schema, ref, schemas
from balancer.filters.limits import KeyView
from balancer.observe.history import SLOTS, WINDOWS
from balancer.observe.record import ExplainedView

TEXT: Schema = {"type": "string"}
LEGACY = "application/json"  # of errors on the paths of the earlier program
COUNT: Schema = {"type": "integer", "minimum": 0, "default": 0}
SWITCH: Schema = {**COUNT, "maximum": 1}

blueprint = Blueprint("openapi", __name__)


def _operation(
    identifier: str,
    summary: str,
    answers: dict[int, Any],
    *,
    body: type[Body] | None = None,
    query: dict[str, Schema] | None = None,
    headers: Sequence[str] = (),
    media_type: str = "application/json",
    errors: str = "application/problem+json",
) -> Schema:
    """`answers` by status: the type of each, or a schema."""
    operation: Schema = {
        "operationId": identifier,
        "summary": summary,
        "responses": {
            **{str(code): _answer(HTTPStatus(code).phrase, answers[code], media_type) for code in answers},
            "4XX": _answer("refused; `error` says why", Error, errors),
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": body is not Nothing, "content": {"application/json": _schema(body)}}
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in (query or {}).items()]
    parameters += [{"name": name, "in": "header", "schema": TEXT} for name in headers]
    if parameters:
        operation["parameters"] = parameters
    return operation


def _answer(description: str, kind: Any, media_type: str) -> Schema:
    return {"description": description, "content": {media_type: _schema(kind)}}


def _schema(kind: Any) -> Schema:
    return {"schema": kind if isinstance(kind, dict) else ref(kind)}


def _in_path(name: str) -> list[Schema]:
    return [{"name": name, "in": "path", "required": True, "schema": TEXT}]


PATHS: dict[str, Schema] = {
    "/status": {
        "get": _operation(
            "getStatus",
            "Everything at one moment. Times in seconds, points in time as epoch seconds.",
            {200: Status},
            query={
                "recent": {"type": "integer", "minimum": 0, "maximum": MAX_RECENT, "default": 20},
                "window": {"type": "integer", "enum": [*WINDOWS], "description": "seconds: what they came to"},
                "since": COUNT | {"description": "a revision: only what has changed of backends; 0 for the first one"},
                "timed": TEXT
                | {"description": "ids, with commas: times, codes and last checks of these backends alone"},
            },
            errors=LEGACY,
        )
    },
    "/health": {"get": _operation("getHealth", "Alive.", {200: Alive}, errors=LEGACY)},
    "/livez": {"get": _operation("getLiveness", "Alive.", {200: Alive})},
    "/readyz": {
        "get": _operation(
            "getReadiness",
            "Ready for traffic: first health round done, not draining.",
            {200: Readiness, 503: Readiness},
        )
    },
    "/algorithm": {
        "get": _operation("getAlgorithm", "The algorithm in use and all there are.", {200: Algorithms}, errors=LEGACY),
        "post": _operation(
            "setAlgorithm",
            "Switch; exact from the next request on.",
            {200: AlgorithmChanged},
            body=AlgorithmChange,
            errors=LEGACY,
        ),
    },
    "/reset": {
        "post": _operation(
            "resetStatistics",
            "Zero statistics, history and recent requests.",
            {200: Message},
            body=Nothing,
            errors=LEGACY,
        )
    },
    "/backends": {
        "get": _operation("listBackends", "All backends, or those of one pool.", {200: Backends}, query={"pool": TEXT}),
        "post": _operation(
            "addBackend",
            "Add a backend; it gets requests after its first good check.",
            {201: ManagedView},
            body=BackendCreate,
        ),
    },
    "/backends/{backend_id}": {
        "parameters": _in_path("backend_id"),
        "get": _operation("getBackend", "One backend.", {200: ManagedView}),
        "patch": _operation(
            "changeBackend", "Change weight, limits or admin_state.", {200: ManagedView}, body=BackendChange
        ),
        "delete": _operation(
            "removeBackend",
            "Remove: no new requests, gone when the last one in flight has ended, later if that is 202; with "
            "`force` at once, and those in flight are cut off.",
            {200: BackendRemoved, 202: BackendRemoved},
            query={"force": SWITCH},
        ),
    },
    "/backends/{backend_id}/faults": {
        "parameters": _in_path("backend_id"),
        "post": _operation(
            "troubleBackend",
            "In the demo (`demo_faults`): faults of its backends, as `backend_server.py` has them.",
            {200: {"type": "object"}},
            body=Anything,
        ),
        "delete": _operation("cureBackend", "End the faults of a backend of the demo.", {200: {"type": "object"}}),
    },
    "/requests/{request_id}": {
        "parameters": _in_path("request_id"),
        "get": _operation(
            "explainRequest",
            "Why a finished request went where it went: candidates, who was excluded and why, scores, attempts.",
            {200: ExplainedView},
        ),
    },
    "/limits": {
        "get": _operation("listLimits", "All limits, and how many requests each let through.", {200: LimitsView})
    },
    "/limits/{name}": {
        "parameters": _in_path("name"),
        "get": _operation(
            "getLimit",
            "How it stands with a key: an address, a value of the header, a subject or a route, as the limit has it. "
            "Nothing is spent. Times in seconds.",
            {200: KeyView},
            query={"key": TEXT},
        ),
    },
    "/cluster": {
        "get": _operation(
            "getCluster",
            "The processes that serve, and how each does; the balancers that share a redis_url, and what all come to.",
            {200: ClusterView},
        )
    },
    "/config": {
        "get": _operation(
            "getConfiguration",
            "Every setting, where it came from, and whether a reload can change it.",
            {200: SettingsView},
        )
    },
    "/reload": {
        "post": _operation(
            "reloadConfiguration",
            "Read the configuration file again and apply what changed in it; a bad file changes nothing. With "
            "`dry_run` it only says what would change; its `hash` in If-Match applies nothing but that (else 412).",
            {200: PlanView},
            body=Nothing,
            query={"dry_run": SWITCH},
            headers=("If-Match",),
        )
    },
    "/events": {
        "get": _operation(
            "getEvents",
            "Health transitions and admin actions newer than `since`, the newest 500 are kept.",
            {200: EventsView},
            query={"since": COUNT},
        )
    },
    "/metrics": {
        "get": _operation(
            "getMetrics",
            "Metrics for Prometheus, or OpenMetrics if Accept asks for it. Counters count since the start of the "
            "process, or of its state_file.",
            {200: TEXT},
            media_type="text/plain",
            query={"name[]": {"type": "string", "description": "this metric alone"}},
        )
    },
    "/history": {
        "get": _operation(
            "getHistory",
            "What happened in each of the last 300 seconds, or 360 times ten seconds, oldest first. A slot starts at "
            "`at` and is told when it is over. One in which nobody looked (the machine slept) is missing. `in_flight` "
            "and `waiting` are the most at any look, one a second; idle backends are left out.",
            {200: HistoryView},
            query={"step": {"type": "integer", "enum": [*SLOTS], "default": 1}, "since": COUNT},
        )
    },
    "/openapi.json": {"get": _operation("getOpenApi", "This description.", {200: {"type": "object"}})},
    "/dashboard": {"get": _operation("getDashboard", "The dashboard.", {200: TEXT}, media_type="text/html")},
}


@blueprint.get("/openapi.json")
def describe_api() -> Response:
    control = current_control()
    return jsonify(document(control.settings.control_prefix, control.access.has_tokens))


def document(prefix: str = "", protected: bool = False) -> Schema:
    """The whole description. `prefix` is `control_prefix`; `protected` if there is a token."""
    components: Schema = {"schemas": schemas()}
    result: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "Load balancer control API", "version": __version__},
        "paths": {prefix + path: item for path, item in PATHS.items()},
        "components": components,
    }
    if protected:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"bearer": []}, {}]
    return result

"""The OpenAPI 3.1 description of the control API, served at `/openapi.json`.

`PATHS` is the one list of control paths: the data path forwards everything that is not on it.
"""

from __future__ import annotations

from typing import Any

from balancer import __version__
from balancer.backends import ID_PATTERN, MAX_CONNECTIONS, MAX_WEIGHT

Schema = dict[str, Any]

_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}


def _object(required: bool = True, /, **properties: Schema) -> Schema:
    schema: Schema = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(properties)
    return schema


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_LATENCY = _object(p50=_or_null(_NUMBER), p95=_or_null(_NUMBER), p99=_or_null(_NUMBER))
_CODES = _object(**{name: _COUNT for name in ("1xx", "2xx", "3xx", "4xx", "5xx")})
_COUNTERS: dict[str, Schema] = {
    "total_requests": _COUNT,
    "successful_requests": _COUNT,
    "failed_requests": _COUNT,
    "aborted_requests": _COUNT,
    "avg_response_time": _NUMBER,
    "latency": _LATENCY,
    "codes": _CODES,
}
_CHECK = _object(at=_NUMBER, duration=_NUMBER, status=_or_null(_COUNT), error=_or_null(_TEXT))
_HEALTH = _object(
    status=_enum("unknown", "up", "down"),
    reason=_or_null(_TEXT),
    since=_NUMBER,
    fall=_COUNT,
    rise=_COUNT,
    consecutive_failures=_COUNT,
    consecutive_successes=_COUNT,
    last_check=_or_null(_CHECK),
)
_BACKEND_FIELDS: dict[str, Schema] = {
    "id": _TEXT,
    "url": _TEXT,
    "healthy": _BOOLEAN,
    "active_connections": _COUNT,
    "weight": _COUNT,
    "max_connections": _or_null(_COUNT),
    "state": _enum("unknown", "up", "down", "ejected", "trial", "drain", "drained", "maint"),
    "admin_state": _enum("ready", "drain", "maint"),
    "drained": _BOOLEAN,
    "admission": _NUMBER,
    "expected_share": _or_null(_NUMBER),
    "source": _enum("default", "file", "environment", "flag", "api"),
    "overrides": {"type": "object"},
    "ejection": _object(
        status=_enum("none", "ejected", "trial"),
        consecutive_failures=_COUNT,
        count=_COUNT,
        until=_or_null(_NUMBER),
        reason=_or_null(_TEXT),
    ),
    "health": _HEALTH,
}
_ALGORITHM = _object(name=_TEXT, description=_TEXT)
_ATTEMPT: dict[str, Schema] = {
    "backend": _TEXT,
    "outcome": _TEXT,
    "error": _or_null(_TEXT),
    "at": _NUMBER,
    "seconds": _NUMBER,
    "connect": _or_null(_NUMBER),
    "resent": _BOOLEAN,
}
_CHOICE: dict[str, Schema] = {
    "algorithm": _TEXT,
    "candidates": _array(_object(id=_TEXT, active=_COUNT, score=_or_null(_NUMBER))),
    "excluded": {"type": "object", "additionalProperties": _TEXT},
}
_FINISHED: dict[str, Schema] = {
    "timestamp": _NUMBER,
    "server_id": _or_null(_TEXT),
    "response_time": _NUMBER,
    "status": _COUNT,
    "method": _TEXT,
    "path": _TEXT,
    "request_id": _TEXT,
    "trace_id": _or_null(_TEXT),
    "queued": _NUMBER,
    "first_byte": _or_null(_NUMBER),
    "bytes_in": _COUNT,
    "bytes_out": _COUNT,
    "attempts": _COUNT,
    "reason": _or_null(_TEXT),
    "not_retried": _or_null(_TEXT),
    "complete": _BOOLEAN,
}
_RECENT = _object(**_FINISHED, tried=_array(_object(**_ATTEMPT)))
_EXPLAINED = _object(
    **_FINISHED,
    algorithm=_or_null(_TEXT),
    error=_or_null(_TEXT),
    excluded=_CHOICE["excluded"],
    tried=_array(_object(**_ATTEMPT, **_CHOICE)),
)
_CONFIG: dict[str, Schema] = {"file": _or_null(_TEXT), "loaded_at": _NUMBER, "last_error": _or_null(_TEXT)}
_SETTING = _object(name=_TEXT, value=_TEXT, source=_TEXT, needs_restart=_BOOLEAN)
_CHANGE = _object(what=_TEXT) | {
    "properties": {"what": _TEXT, "from": {}, "to": {}},
    "required": ["what", "from", "to"],
}
_RELOADED = _object(
    applied=_BOOLEAN,
    changes=_array(_CHANGE),
    kept=_array(_TEXT),
    needs_restart=_array(_TEXT),
    shares=_or_null({"type": "object", "additionalProperties": _NUMBER}),
)
_EVENT = _object(
    seq=_COUNT,
    timestamp=_NUMBER,
    kind=_TEXT,
    backend=_or_null(_TEXT),
    message=_TEXT,
    severity=_enum("info", "warning", "error"),
    count=_COUNT,
)
_TRAFFIC: dict[str, Schema] = {
    "requests": _COUNT,
    "failed": _COUNT,
    "in_flight": _COUNT,
    "p50": _or_null(_NUMBER),
    "p95": _or_null(_NUMBER),
    "p99": _or_null(_NUMBER),
}
_POINT = _object(
    at=_COUNT,
    **_TRAFFIC,
    retries=_COUNT,
    waiting=_COUNT,
    backends={"type": "object", "additionalProperties": _object(**_TRAFFIC)},
)
_STATUS = _object(
    schema_version=_COUNT,
    version=_TEXT,
    load_balancer_id=_TEXT,
    algorithm=_TEXT,
    lifecycle=_enum("starting", "running", "draining"),
    now=_NUMBER,
    uptime=_NUMBER,
    events_seq=_COUNT,
    panic=_BOOLEAN,
    config=_object(**_CONFIG),
    statistics=_object(
        **_COUNTERS,
        start_time=_NUMBER,
        active_requests=_COUNT,
        queued_requests=_COUNT,
        access_log_dropped=_COUNT,
        waiting_requests=_COUNT,
        unassigned_requests=_COUNT,
        retries=_COUNT,
        requests_per_second=_NUMBER,
    ),
    backend_servers=_array(_object(**_BACKEND_FIELDS, **_COUNTERS)),
    recent_requests=_array(_RECENT),
    capabilities=_object(
        writes=_BOOLEAN,
        token_required=_BOOLEAN,
        reload=_BOOLEAN,
        traffic=_BOOLEAN
        | {
            "description": "whether this address forwards requests too; false if control_port gives it only these paths"
        },
        algorithms=_array(_ALGORITHM),
    ),
)
_WEIGHT: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_WEIGHT}
_MAX_CONNECTIONS = _or_null({"type": "integer", "minimum": 1, "maximum": MAX_CONNECTIONS})
_ID: Schema = {"type": "string", "pattern": f"^{ID_PATTERN}$"}

SCHEMAS: dict[str, Schema] = {
    "Status": _STATUS,
    "Backend": _object(**_BACKEND_FIELDS),
    "Error": _object(error=_TEXT),
    "Message": _object(message=_TEXT),
    "AlgorithmChange": _object(algorithm=_TEXT) | {"additionalProperties": False},
    "BackendCreate": _object(
        False, url={"type": "string", "maxLength": 300}, id=_ID, weight=_WEIGHT, max_connections=_MAX_CONNECTIONS
    )
    | {"required": ["url"], "additionalProperties": False},
    "BackendChange": _object(
        False, weight=_WEIGHT, max_connections=_MAX_CONNECTIONS, admin_state=_enum("ready", "drain", "maint")
    )
    | {"minProperties": 1, "additionalProperties": False},
    "Nothing": {"type": "object", "additionalProperties": False},
}


def _json(schema: Schema, description: str, media_type: str = "application/json") -> Schema:
    return {"description": description, "content": {media_type: {"schema": schema}}}


def _operation(
    identifier: str,
    summary: str,
    answers: dict[str, Schema],
    *,
    body: str | None = None,
    optional_body: bool = False,
    query: dict[str, Schema] | None = None,
    errors: str = "application/problem+json",
) -> Schema:
    operation: Schema = {
        "operationId": identifier,
        "summary": summary,
        "responses": answers | {"4XX": _json(_ref("Error"), "refused; `error` says why", errors)},
    }
    if body is not None:
        content = {"application/json": {"schema": _ref(body)}}
        operation["requestBody"] = {"required": not optional_body, "content": content}
    if query:
        operation["parameters"] = [{"name": name, "in": "query", "schema": query[name]} for name in query]
    return operation


_LEGACY = "application/json"
_healthy = _object(status=_TEXT, load_balancer_id=_TEXT)
_ready = _object(status=_TEXT, lifecycle=_TEXT)

PATHS: dict[str, Schema] = {
    "/status": {
        "get": _operation(
            "getStatus",
            "Everything at one moment. Times in seconds, points in time as epoch seconds.",
            {"200": _json(_ref("Status"), "the state")},
            query={"recent": {"type": "integer", "minimum": 0, "maximum": 100, "default": 20}},
            errors=_LEGACY,
        )
    },
    "/health": {"get": _operation("getHealth", "Alive.", {"200": _json(_healthy, "alive")}, errors=_LEGACY)},
    "/livez": {"get": _operation("getLiveness", "Alive.", {"200": _json(_healthy, "alive")})},
    "/readyz": {
        "get": _operation(
            "getReadiness",
            "Ready for traffic: first health round done, not draining.",
            {"200": _json(_ready, "ready"), "503": _json(_ready, "not ready")},
        )
    },
    "/algorithm": {
        "get": _operation(
            "getAlgorithm",
            "The algorithm in use and all there are.",
            {"200": _json(_object(current=_TEXT, algorithms=_array(_ALGORITHM)), "the algorithms")},
            errors=_LEGACY,
        ),
        "post": _operation(
            "setAlgorithm",
            "Switch; exact from the next request on.",
            {"200": _json(_object(message=_TEXT, current=_TEXT), "switched")},
            body="AlgorithmChange",
            errors=_LEGACY,
        ),
    },
    "/reset": {
        "post": _operation(
            "resetStatistics",
            "Zero statistics, history and recent requests.",
            {"200": _json(_ref("Message"), "done")},
            body="Nothing",
            optional_body=True,
            errors=_LEGACY,
        )
    },
    "/backends": {
        "get": _operation(
            "listBackends", "All backends.", {"200": _json(_object(backends=_array(_ref("Backend"))), "the backends")}
        ),
        "post": _operation(
            "addBackend",
            "Add a backend; it gets requests after its first good check.",
            {"201": _json(_ref("Backend"), "added")},
            body="BackendCreate",
        ),
    },
    "/backends/{backend_id}": {
        "parameters": [{"name": "backend_id", "in": "path", "required": True, "schema": _TEXT}],
        "get": _operation("getBackend", "One backend.", {"200": _json(_ref("Backend"), "the backend")}),
        "patch": _operation(
            "changeBackend",
            "Change weight, max_connections or admin_state.",
            {"200": _json(_ref("Backend"), "changed")},
            body="BackendChange",
        ),
        "delete": _operation(
            "removeBackend",
            "Remove: no new requests, gone when the last one in flight has ended.",
            {
                "200": _json(_object(message=_TEXT, active=_COUNT), "removed"),
                "202": _json(_object(message=_TEXT, active=_COUNT), "removed when its requests have ended"),
            },
        ),
    },
    "/requests/{request_id}": {
        "parameters": [{"name": "request_id", "in": "path", "required": True, "schema": _TEXT}],
        "get": _operation(
            "explainRequest",
            "Why a finished request went where it went: candidates, who was excluded and why, scores, attempts.",
            {"200": _json(_EXPLAINED, "the request")},
        ),
    },
    "/config": {
        "get": _operation(
            "getConfiguration",
            "Every setting, where it came from, and whether a reload can change it.",
            {"200": _json(_object(**_CONFIG, settings=_array(_SETTING)), "the settings")},
        )
    },
    "/reload": {
        "post": _operation(
            "reloadConfiguration",
            "Read the configuration file again and apply what changed in it; a bad file changes nothing.",
            {"200": _json(_RELOADED, "what changed, or with `dry_run` what would")},
            body="Nothing",
            optional_body=True,
            query={"dry_run": {"type": "integer", "minimum": 0, "maximum": 1, "default": 0}},
        )
    },
    "/events": {
        "get": _operation(
            "getEvents",
            "Health transitions and admin actions newer than `since`, the newest 500 are kept.",
            {"200": _json(_object(events=_array(_EVENT), latest=_COUNT), "the events")},
            query={"since": {"type": "integer", "minimum": 0, "default": 0}},
        )
    },
    "/metrics": {
        "get": _operation(
            "getMetrics",
            "Metrics for Prometheus, or OpenMetrics for who asks for that. Counters count since the start of the "
            "process.",
            {"200": _json(_TEXT, "the metrics", "text/plain")},
            query={"name[]": {"type": "string", "description": "this metric alone"}},
        )
    },
    "/history": {
        "get": _operation(
            "getHistory",
            "What happened in each of the last 300 seconds, or 360 times ten seconds, oldest first. A slot starts at "
            "`at` and is told when it is over. One in which nobody looked (the machine slept) is missing. `in_flight` "
            "and `waiting` are the most at any look, one a second; idle backends are left out.",
            {"200": _json(_object(step=_COUNT, now=_NUMBER, points=_array(_POINT)), "the slots after `since`")},
            query={
                "step": {"type": "integer", "enum": [1, 10], "default": 1},
                "since": {"type": "integer", "minimum": 0, "default": 0},
            },
        )
    },
    "/openapi.json": {
        "get": _operation("getOpenApi", "This description.", {"200": _json({"type": "object"}, "OpenAPI 3.1")})
    },
    "/dashboard": {
        "get": _operation("getDashboard", "The dashboard.", {"200": _json(_TEXT, "the page", "text/html")}),
    },
}


def document(prefix: str = "", protected: bool = False) -> Schema:
    """The whole description. `prefix` is `control_prefix`; `protected` if writes need the admin token."""
    components: Schema = {"schemas": SCHEMAS}
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

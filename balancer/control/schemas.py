"""What bodies and answers of the control API look like, as JSON Schema, for `openapi`.

What is accepted, the models of `inputs` decide, and answers are made by the parts that they tell of; tests hold both
against what is said here.
"""

from __future__ import annotations

from typing import Any

from balancer.balancing.backends import ID_PATTERN, MAX_CONNECTIONS, MAX_WEIGHT

Schema = dict[str, Any]

_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
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


def ref(name: str) -> Schema:
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
_CHECK = _object(at=_NUMBER, duration=_NUMBER, status=_or_null(_COUNT), error=_or_null(TEXT))
_HEALTH = _object(
    status=_enum("unknown", "up", "down"),
    reason=_or_null(TEXT),
    since=_NUMBER,
    fall=_COUNT,
    rise=_COUNT,
    consecutive_failures=_COUNT,
    consecutive_successes=_COUNT,
    last_check=_or_null(_CHECK),
)
_BACKEND_FIELDS: dict[str, Schema] = {
    "id": TEXT,
    "url": TEXT,
    "healthy": _BOOLEAN,
    "active_connections": _COUNT,
    "weight": _COUNT,
    "max_connections": _or_null(_COUNT),
    "state": _enum("unknown", "up", "down", "ejected", "trial", "drain", "drained", "maint"),
    "admin_state": _enum("ready", "drain", "maint"),
    "drained": _BOOLEAN,
    "admission": _NUMBER,
    "expected_share": _or_null(_NUMBER),
    "source": _enum("default", "file", "environment", "flag", "program", "api"),
    "overrides": {"type": "object"},
    "ejection": _object(
        status=_enum("none", "ejected", "trial"),
        consecutive_failures=_COUNT,
        count=_COUNT,
        until=_or_null(_NUMBER),
        reason=_or_null(TEXT),
    ),
    "health": _HEALTH,
}
_ALGORITHM = _object(name=TEXT, description=TEXT)
_ATTEMPT: dict[str, Schema] = {
    "backend": TEXT,
    "outcome": TEXT,
    "error": _or_null(TEXT),
    "at": _NUMBER,
    "seconds": _NUMBER,
    "connect": _or_null(_NUMBER),
    "resent": _BOOLEAN,
}
_CHOICE: dict[str, Schema] = {
    "algorithm": TEXT,
    "candidates": _array(_object(id=TEXT, active=_COUNT, score=_or_null(_NUMBER))),
    "excluded": {"type": "object", "additionalProperties": TEXT},
}
_FINISHED: dict[str, Schema] = {
    "timestamp": _NUMBER,
    "server_id": _or_null(TEXT),
    "response_time": _NUMBER,
    "status": _COUNT,
    "method": TEXT,
    "path": TEXT,
    "request_id": TEXT,
    "trace_id": _or_null(TEXT),
    "queued": _NUMBER,
    "first_byte": _or_null(_NUMBER),
    "bytes_in": _COUNT,
    "bytes_out": _COUNT,
    "attempts": _COUNT,
    "reason": _or_null(TEXT),
    "not_retried": _or_null(TEXT),
    "complete": _BOOLEAN,
}
_RECENT = _object(**_FINISHED, tried=_array(_object(**_ATTEMPT)))
EXPLAINED = _object(
    **_FINISHED,
    algorithm=_or_null(TEXT),
    error=_or_null(TEXT),
    excluded=_CHOICE["excluded"],
    tried=_array(_object(**_ATTEMPT, **_CHOICE)),
)
_CONFIG: dict[str, Schema] = {"file": _or_null(TEXT), "loaded_at": _NUMBER, "last_error": _or_null(TEXT)}
_SETTING = _object(name=TEXT, value=TEXT, source=TEXT, needs_restart=_BOOLEAN)
_CHANGE = _object(what=TEXT) | {
    "properties": {"what": TEXT, "from": {}, "to": {}},
    "required": ["what", "from", "to"],
}
RELOADED = _object(
    applied=_BOOLEAN,
    changes=_array(_CHANGE),
    kept=_array(TEXT),
    needs_restart=_array(TEXT),
    shares=_or_null({"type": "object", "additionalProperties": _NUMBER}),
)
_EVENT = _object(
    seq=_COUNT,
    timestamp=_NUMBER,
    kind=TEXT,
    backend=_or_null(TEXT),
    message=TEXT,
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
    version=TEXT,
    load_balancer_id=TEXT,
    algorithm=TEXT,
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
        writes=_BOOLEAN | {"description": "whether who asks could write, if need be with a token"},
        token_required=_BOOLEAN | {"description": "whether there is a token, which a page needs to write"},
        authorized=_BOOLEAN | {"description": "whether a valid token came with this request; else paths are cut"},
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

# Written out where `openapi` uses them; what is in SCHEMAS has a name in the description.
HEALTHY = _object(status=TEXT, load_balancer_id=TEXT)
READY = _object(status=TEXT, lifecycle=TEXT)
ALGORITHMS = _object(current=TEXT, algorithms=_array(_ALGORITHM))
SWITCHED = _object(message=TEXT, current=TEXT)
BACKENDS = _object(backends=_array(ref("Backend")))
REMOVED = _object(message=TEXT, active=_COUNT)
SETTINGS = _object(**_CONFIG, settings=_array(_SETTING))
EVENTS = _object(events=_array(_EVENT), latest=_COUNT)
HISTORY = _object(step=_COUNT, now=_NUMBER, points=_array(_POINT))

SCHEMAS: dict[str, Schema] = {
    "Status": _STATUS,
    "Backend": _object(**_BACKEND_FIELDS),
    "Error": _object(error=TEXT),
    "Message": _object(message=TEXT),
    "AlgorithmChange": _object(algorithm=TEXT) | {"additionalProperties": False},
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

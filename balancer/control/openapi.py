"""The OpenAPI 3.1 description of the control API, served at `/openapi.json`.

`PATHS` is the one list of control paths: the data path forwards everything that is not on it.
"""

from __future__ import annotations

from balancer import __version__
from balancer.control import schemas
from balancer.control.schemas import Schema


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
        "responses": answers | {"4XX": _json(schemas.ref("Error"), "refused; `error` says why", errors)},
    }
    if body is not None:
        content = {"application/json": {"schema": schemas.ref(body)}}
        operation["requestBody"] = {"required": not optional_body, "content": content}
    if query:
        operation["parameters"] = [{"name": name, "in": "query", "schema": query[name]} for name in query]
    return operation


_LEGACY = "application/json"

PATHS: dict[str, Schema] = {
    "/status": {
        "get": _operation(
            "getStatus",
            "Everything at one moment. Times in seconds, points in time as epoch seconds.",
            {"200": _json(schemas.ref("Status"), "the state")},
            query={"recent": {"type": "integer", "minimum": 0, "maximum": 100, "default": 20}},
            errors=_LEGACY,
        )
    },
    "/health": {"get": _operation("getHealth", "Alive.", {"200": _json(schemas.HEALTHY, "alive")}, errors=_LEGACY)},
    "/livez": {"get": _operation("getLiveness", "Alive.", {"200": _json(schemas.HEALTHY, "alive")})},
    "/readyz": {
        "get": _operation(
            "getReadiness",
            "Ready for traffic: first health round done, not draining.",
            {"200": _json(schemas.READY, "ready"), "503": _json(schemas.READY, "not ready")},
        )
    },
    "/algorithm": {
        "get": _operation(
            "getAlgorithm",
            "The algorithm in use and all there are.",
            {"200": _json(schemas.ALGORITHMS, "the algorithms")},
            errors=_LEGACY,
        ),
        "post": _operation(
            "setAlgorithm",
            "Switch; exact from the next request on.",
            {"200": _json(schemas.SWITCHED, "switched")},
            body="AlgorithmChange",
            errors=_LEGACY,
        ),
    },
    "/reset": {
        "post": _operation(
            "resetStatistics",
            "Zero statistics, history and recent requests.",
            {"200": _json(schemas.ref("Message"), "done")},
            body="Nothing",
            optional_body=True,
            errors=_LEGACY,
        )
    },
    "/backends": {
        "get": _operation("listBackends", "All backends.", {"200": _json(schemas.BACKENDS, "the backends")}),
        "post": _operation(
            "addBackend",
            "Add a backend; it gets requests after its first good check.",
            {"201": _json(schemas.ref("Backend"), "added")},
            body="BackendCreate",
        ),
    },
    "/backends/{backend_id}": {
        "parameters": [{"name": "backend_id", "in": "path", "required": True, "schema": schemas.TEXT}],
        "get": _operation("getBackend", "One backend.", {"200": _json(schemas.ref("Backend"), "the backend")}),
        "patch": _operation(
            "changeBackend",
            "Change weight, max_connections or admin_state.",
            {"200": _json(schemas.ref("Backend"), "changed")},
            body="BackendChange",
        ),
        "delete": _operation(
            "removeBackend",
            "Remove: no new requests, gone when the last one in flight has ended.",
            {
                "200": _json(schemas.REMOVED, "removed"),
                "202": _json(schemas.REMOVED, "removed when its requests have ended"),
            },
        ),
    },
    "/requests/{request_id}": {
        "parameters": [{"name": "request_id", "in": "path", "required": True, "schema": schemas.TEXT}],
        "get": _operation(
            "explainRequest",
            "Why a finished request went where it went: candidates, who was excluded and why, scores, attempts.",
            {"200": _json(schemas.EXPLAINED, "the request")},
        ),
    },
    "/config": {
        "get": _operation(
            "getConfiguration",
            "Every setting, where it came from, and whether a reload can change it.",
            {"200": _json(schemas.SETTINGS, "the settings")},
        )
    },
    "/reload": {
        "post": _operation(
            "reloadConfiguration",
            "Read the configuration file again and apply what changed in it; a bad file changes nothing.",
            {"200": _json(schemas.RELOADED, "what changed, or with `dry_run` what would")},
            body="Nothing",
            optional_body=True,
            query={"dry_run": {"type": "integer", "minimum": 0, "maximum": 1, "default": 0}},
        )
    },
    "/events": {
        "get": _operation(
            "getEvents",
            "Health transitions and admin actions newer than `since`, the newest 500 are kept.",
            {"200": _json(schemas.EVENTS, "the events")},
            query={"since": {"type": "integer", "minimum": 0, "default": 0}},
        )
    },
    "/metrics": {
        "get": _operation(
            "getMetrics",
            "Metrics for Prometheus, or for OpenMetrics if `Accept` asks for it. Counters count since the start of the "
            "process.",
            {"200": _json(schemas.TEXT, "the metrics", "text/plain")},
            query={"name[]": {"type": "string", "description": "this metric alone"}},
        )
    },
    "/history": {
        "get": _operation(
            "getHistory",
            "What happened in each of the last 300 seconds, or 360 times ten seconds, oldest first. A slot starts at "
            "`at` and is told when it is over. One in which nobody looked (the machine slept) is missing. `in_flight` "
            "and `waiting` are the most at any look, one a second; idle backends are left out.",
            {"200": _json(schemas.HISTORY, "the slots after `since`")},
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
        "get": _operation("getDashboard", "The dashboard.", {"200": _json(schemas.TEXT, "the page", "text/html")}),
    },
}


def document(prefix: str = "", protected: bool = False) -> Schema:
    """The whole description. `prefix` is `control_prefix`; `protected` if there is a token."""
    components: Schema = {"schemas": schemas.SCHEMAS}
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

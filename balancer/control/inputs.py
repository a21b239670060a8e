"""What control requests bring: their bodies and query parameters, read, checked, refused.

Each body has its model here, of which `openapi` tells clients. Nothing is converted or ignored: an unknown field, a
number in quotes or a wrong value is refused, and the answer names it and what would fit.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from flask import request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from werkzeug.exceptions import RequestEntityTooLarge

from balancer.balancing.backends import AdminState
from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import validation
from balancer.config.values import DrainTimeout, MaxConnections, Weight
from balancer.control.paths import MAX_BODY
from balancer.control.problems import ApiError, is_legacy
from balancer.protocol.origin import EXPECTED
from balancer.protocol.texts import shown

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # of a time, in seconds


class Body(BaseModel):
    """Base of all request bodies: no unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)


# Of a change that may be for a time; `for` is a word of Python's own.
Duration = Annotated[
    str | None,
    Field(alias="for", pattern=validation.DURATION, description="undo it after this time, such as 15m; else it stays"),
]


class AlgorithmChange(Body):
    algorithm: str = Field(description="name from GET /algorithm")
    pool: str = Field(DEFAULT_POOL, description="name of the pool")
    duration: Duration = None


class Nothing(Body):
    """An empty object."""


class Anything(Body):
    """An object that somebody else checks."""

    model_config = ConfigDict(extra="allow")


class BackendCreate(Body):
    id: str | None = Field(None, pattern=validation.ID, description="unique name; chosen if left out")
    pool: str = Field(DEFAULT_POOL, description="name of its pool")
    url: str = Field(max_length=300, description=EXPECTED)
    weight: Weight = 1
    max_connections: MaxConnections | None = None
    drain_timeout: DrainTimeout | None = None


class BackendChange(Body):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    # What is left out stays as it is: nobody asks for these defaults, and the schema has none.
    weight: Weight = Field(default_factory=int)
    max_connections: MaxConnections | None = Field(None, description="null for no limit")
    drain_timeout: DrainTimeout | None = Field(None, description="null for backend_drain_timeout")
    admin_state: AdminState = Field(default_factory=lambda: "ready")
    duration: Duration = None


M = TypeVar("M", bound=Body)


def read_body(model: type[M]) -> M:
    """The request body as `model`. Raises ApiError 413 if it is too large, 400 if no JSON, 422 for a wrong value."""
    data = received()
    try:
        given = json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique) if data else {}
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"expected a JSON object, not {type(given).__name__}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        known = ", ".join(field.alias or name for name, field in model.model_fields.items()) or "no fields"
        details = "; ".join(_explain(detail, model) for detail in error.errors(include_url=False))
        status = 400 if is_legacy() else 422  # the clients of the earlier program know only that
        raise ApiError(status, f"{details} (fields: {known})"[:1000]) from None


def seconds(duration: str | None) -> int | None:
    return None if duration is None else int(duration[:-1]) * UNITS[duration[-1]]


def received() -> bytes:
    """The request body as it came. Raises ApiError 413 if it is too large."""
    try:
        data = request.get_data()
    except RequestEntityTooLarge:
        data = None
    if data is None or len(data) > MAX_BODY:
        raise ApiError(413, f"the body is larger than {MAX_BODY} bytes")
    return data


def whole_number(name: str, default: int, maximum: int) -> int:
    """A query parameter from 0 to `maximum`. Raises ApiError 400."""
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,15}", text) or int(text) > maximum:
        raise ApiError(400, f"{name}={text[:40]!r}: expected a whole number from 0 to {maximum}")
    return int(text)


def switch(name: str) -> bool:
    """The only query parameter that there is: on if it is 1. Raises ApiError 400."""
    if unknown := sorted(set(request.args) - {name}):  # a slip of the pen must not become the other thing
        raise ApiError(400, f"unknown parameter {unknown[0][:40]!r}; there is {name}=1")
    return whole_number(name, 0, 1) == 1


def _explain(detail: Any, model: type[Body]) -> str:
    if not detail["loc"]:  # a name that is no text, so pydantic has none to tell: half of a surrogate pair
        return "the name of a field is not Unicode"
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"unknown field {name[:80]!r}"
    value = "" if detail["type"] == "missing" else f" = {validation.shown(detail['input'], hide=name == 'url')}"
    return f"{name}{value}: {validation.complaint(detail, model)}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values counts (RFC 8259 section 4)."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name in found if sum(name == other for other, _ in pairs) > 1)
        raise ApiError(400, f"the body has {shown(name, 80)!r} twice")
    return found

"""Routes for limits: which there are, what they came to, and how one stands with a key."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request
from typing_extensions import TypedDict

from balancer.control.control import current_control
from balancer.control.problems import ApiError
from balancer.filters.limits import LimitView

blueprint = Blueprint("limits", __name__)


class LimitsView(TypedDict):
    limits: list[LimitView]


@blueprint.get("/limits")
def list_limits() -> Response:
    return jsonify(LimitsView(limits=current_control().limiter.describe()))


@blueprint.get("/limits/<name>")
def look_at_limit(name: str) -> Response:
    limiter, key = current_control().limiter, request.args.get("key", "")
    limit = limiter.find(name)
    if limit is None:
        raise ApiError(404, f"no limit {name[:80]!r}")
    if not key and limit.options.key != "global":
        raise ApiError(400, f"this limit goes by {limit.options.key}; expected ?key= and one of these")
    return jsonify(limiter.look(limit, key))

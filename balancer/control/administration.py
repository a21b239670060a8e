"""Routes for what can be changed while it runs: the algorithm, the statistics, the configuration, the backends.

`guard` has let a write through before it comes here. A wrong value is 422, a conflict with what there is 409; the
paths of the earlier program know only 400.
"""

from __future__ import annotations

import json

import requests
from flask import Blueprint, Response, jsonify, request
from typing_extensions import TypedDict

from balancer.balancing import strategies
from balancer.balancing.changes import ACTOR
from balancer.balancing.options import StrategyOptions
from balancer.balancing.pool import BackendPool
from balancer.balancing.strategies import StrategyView
from balancer.config.decisions import ALGORITHM, Fields, Key
from balancer.config.reload import PlanChanged
from balancer.control.control import ManagedView, current_control
from balancer.control.inputs import (
    AlgorithmChange,
    Anything,
    BackendChange,
    BackendCreate,
    Nothing,
    read_body,
    seconds,
    switch,
)
from balancer.control.problems import ApiError
from balancer.errors import SettingsError
from balancer.protocol.origin import Origin
from balancer.protocol.texts import shown

FAULTS_TIMEOUT = 5.0  # seconds

blueprint = Blueprint("administration", __name__)


class Algorithms(TypedDict):
    """`current` is that of the pool `default`, `pools` has those of all by name."""

    current: str
    pools: dict[str, str]
    algorithms: list[StrategyView]


class Message(TypedDict):
    message: str


class AlgorithmChanged(Message):
    current: str


class BackendRemoved(Message):
    active: int


class Backends(TypedDict):
    backends: list[ManagedView]


# The algorithm, the statistics, the configuration.


@blueprint.get("/algorithm")
def show_algorithm() -> Response:
    pools = current_control().pools
    in_use = {pool["name"]: pool["algorithm"] for pool in pools.describe() if not pool["leaving"]}
    current = pools.default.algorithm
    return jsonify(Algorithms(current=current, pools=in_use, algorithms=strategies.describe()))


@blueprint.post("/algorithm")
def change_algorithm() -> Response:
    wanted = read_body(AlgorithmChange)
    name, pool = wanted.algorithm.strip(), _pool(wanted.pool, 400)
    if name not in strategies.REGISTRY:
        raise ApiError(400, f"unknown algorithm {name[:80]!r}", valid_options=list(strategies.REGISTRY))
    settings = current_control().settings.by_pool()[pool.name]
    with current_control().decisions.making([Key(pool.name, "", ALGORITHM)], seconds(wanted.duration)):
        if name == pool.algorithm:
            return jsonify(AlgorithmChanged(message=f"{name} is already in use", current=name))
        pool.use(strategies.create(name, settings.options(StrategyOptions)))
    return jsonify(AlgorithmChanged(message=f"algorithm changed to {name}", current=name))


@blueprint.post("/reset")
def reset() -> Response:
    read_body(Nothing)
    control = current_control()
    control.statistics.reset()
    control.routes.reset()
    control.history.clear()
    control.events.add("statistics_reset", None, "statistics, history and recent requests were reset", by=ACTOR.get())
    return jsonify(Message(message="statistics reset"))


@blueprint.post("/reload")
def reload() -> Response:
    read_body(Nothing)
    dry_run, wanted = switch("dry_run"), request.if_match  # RFC 9110 section 13.1.1
    try:
        plan = current_control().reload(dry_run, wanted.contains if wanted else lambda hash: True)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    except PlanChanged as error:
        raise ApiError(412, str(error)) from None
    return jsonify(plan.describe(applied=not dry_run))


# Backends.


@blueprint.get("/backends")
def list_backends() -> Response:
    name = request.args.get("pool")
    found = current_control().backends(None if name is None else _pool(name, 400))
    return jsonify(Backends(backends=found))


@blueprint.post("/backends")
def add_backend() -> tuple[Response, int, dict[str, str]]:
    wanted = read_body(BackendCreate)
    pool = _pool(wanted.pool, 422)
    try:
        origin = Origin.parse(wanted.url)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    try:
        fields = wanted.model_dump(exclude={"id", "pool", "url"})
        with current_control().decisions.making():
            backend = current_control().pools.add(pool, wanted.id, origin, **fields)
    except SettingsError as error:
        raise ApiError(409, str(error)) from None
    return jsonify(_describe(backend.id)), 201, {"Location": f"backends/{backend.id}"}  # a proxy may have another path


@blueprint.get("/backends/<backend_id>")
def show_backend(backend_id: str) -> Response:
    return jsonify(_describe(backend_id))


@blueprint.patch("/backends/<backend_id>")
def change_backend(backend_id: str) -> Response:
    wanted = read_body(BackendChange)
    changes = wanted.model_dump(exclude_unset=True, exclude={"duration"})
    if not changes:
        raise ApiError(422, f"nothing to change; give one of: {', '.join(Fields.model_fields)}")
    pool = _pool_of(backend_id)
    keys = [Key(pool.name, backend_id, field) for field in changes]
    try:
        with current_control().decisions.making(keys, seconds(wanted.duration)):
            pool.update(backend_id, changes)
    except KeyError:
        raise _unknown(backend_id) from None
    return jsonify(_describe(backend_id))


@blueprint.delete("/backends/<backend_id>")
def remove_backend(backend_id: str) -> tuple[Response, int]:
    force = switch("force")
    try:
        with current_control().decisions.making():
            active = _pool_of(backend_id).remove(backend_id, at_once=force)
    except KeyError:
        raise _unknown(backend_id) from None
    if active and force:
        text = f"{backend_id} removed, {active} requests in flight are cut off"
        return jsonify(BackendRemoved(message=text, active=active)), 200
    if active:
        text = f"{backend_id} is removed when its requests have ended"
        return jsonify(BackendRemoved(message=text, active=active)), 202
    return jsonify(BackendRemoved(message=f"{backend_id} removed", active=0)), 200


@blueprint.route("/backends/<backend_id>/faults", methods=["POST", "DELETE"])
def trouble_backend(backend_id: str) -> Response:
    """In the demo alone: what the backend itself lets nobody but a person at a terminal do (`backend_server.py`)."""
    if not current_control().settings.demo_faults:
        raise ApiError(404, "only the demo's backends can be troubled: demo_faults is off")
    body = json.dumps(read_body(Anything).model_extra) if request.method == "POST" else None
    with requests.Session() as session:
        session.trust_env = False
        headers = {"Content-Type": "application/json"}
        try:
            url = f"{_describe(backend_id)['url']}/faults"
            answer = session.request(request.method, url, data=body, headers=headers, timeout=FAULTS_TIMEOUT)
            found = answer.json()
        except requests.RequestException as error:
            raise ApiError(409, f"{backend_id} did not answer: {type(error).__name__}") from None
    if not answer.ok or not isinstance(found, dict):
        raise ApiError(422, f"{backend_id} refused: {shown(str(found), 200)}")
    return jsonify(found)


def _pool(name: str, status: int) -> BackendPool:
    """Raises ApiError with this status if there is none, or it is about to go."""
    pools = current_control().pools
    pool = pools.get(name)
    if pool is None:
        raise ApiError(
            status, f"no pool {name[:80]!r}, expected one of: {', '.join(pools.names)}", valid_options=pools.names
        )
    return pool


def _pool_of(backend_id: str) -> BackendPool:
    pool = current_control().pools.pool_of(backend_id)
    if pool is None:
        raise _unknown(backend_id)
    return pool


def _describe(backend_id: str) -> ManagedView:
    for backend in current_control().backends(_pool_of(backend_id)):
        if backend["id"] == backend_id:
            return backend
    raise _unknown(backend_id)


def _unknown(backend_id: str) -> ApiError:
    known = [backend.id for backend in current_control().pools.backends()]
    return ApiError(404, f"no backend {backend_id[:80]!r}", valid_options=known)

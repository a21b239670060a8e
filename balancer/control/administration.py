"""Routes for what can be changed while it runs: the algorithm, the statistics, the configuration, the backends.

`guard` has let a write through before it comes here. A wrong value is 422, a conflict with what there is 409; the
paths of the earlier program know only 400.
"""

from __future__ import annotations

from flask import Blueprint, Response, jsonify
from typing_extensions import TypedDict

from balancer.balancing import strategies
from balancer.balancing.backends import BackendView
from balancer.balancing.changes import ACTOR
from balancer.balancing.options import StrategyOptions
from balancer.balancing.strategies import StrategyView
from balancer.control.control import current_control
from balancer.control.inputs import AlgorithmChange, BackendChange, BackendCreate, Nothing, read_body, switch
from balancer.control.problems import ApiError
from balancer.errors import SettingsError
from balancer.protocol.origin import Origin

blueprint = Blueprint("administration", __name__)


class Algorithms(TypedDict):
    current: str
    algorithms: list[StrategyView]


class Message(TypedDict):
    message: str


class AlgorithmChanged(Message):
    current: str


class BackendRemoved(Message):
    active: int


class Backends(TypedDict):
    backends: list[BackendView]


# The algorithm, the statistics, the configuration.


@blueprint.get("/algorithm")
def show_algorithm() -> Response:
    return jsonify(Algorithms(current=current_control().pool.algorithm, algorithms=strategies.describe()))


@blueprint.post("/algorithm")
def change_algorithm() -> Response:
    name = read_body(AlgorithmChange).algorithm.strip()
    if name not in strategies.REGISTRY:
        raise ApiError(400, f"unknown algorithm {name[:80]!r}", valid_options=list(strategies.REGISTRY))
    control = current_control()
    if name == control.pool.algorithm:
        return jsonify(AlgorithmChanged(message=f"{name} is already in use", current=name))
    control.pool.use(strategies.create(name, control.settings.options(StrategyOptions)))
    return jsonify(AlgorithmChanged(message=f"algorithm changed to {name}", current=name))


@blueprint.post("/reset")
def reset() -> Response:
    read_body(Nothing)
    control = current_control()
    control.statistics.reset()
    control.history.clear()
    control.events.add("statistics_reset", None, "statistics, history and recent requests were reset", by=ACTOR.get())
    return jsonify(Message(message="statistics reset"))


@blueprint.post("/reload")
def reload() -> Response:
    read_body(Nothing)
    dry_run = switch("dry_run")
    try:
        plan = current_control().reload(dry_run)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    return jsonify(plan.describe(applied=not dry_run))


# Backends.


@blueprint.get("/backends")
def list_backends() -> Response:
    return jsonify(Backends(backends=current_control().pool.snapshot()))


@blueprint.post("/backends")
def add_backend() -> tuple[Response, int, dict[str, str]]:
    wanted = read_body(BackendCreate)
    control = current_control()
    try:
        origin = Origin.parse(wanted.url)
    except SettingsError as error:
        raise ApiError(422, str(error)) from None
    try:
        fields = wanted.model_dump(exclude={"id", "url"})
        backend = control.pool.add(wanted.id, origin, **fields)
    except SettingsError as error:
        raise ApiError(409, str(error)) from None
    return jsonify(_describe(backend.id)), 201, {"Location": f"backends/{backend.id}"}  # a proxy may have another path


@blueprint.get("/backends/<backend_id>")
def show_backend(backend_id: str) -> Response:
    return jsonify(_describe(backend_id))


@blueprint.patch("/backends/<backend_id>")
def change_backend(backend_id: str) -> Response:
    changes = read_body(BackendChange).model_dump(exclude_unset=True)
    if not changes:
        raise ApiError(422, f"nothing to change; give one of: {', '.join(BackendChange.model_fields)}")
    try:
        current_control().pool.update(backend_id, changes)
    except KeyError:
        raise _unknown(backend_id) from None
    return jsonify(_describe(backend_id))


@blueprint.delete("/backends/<backend_id>")
def remove_backend(backend_id: str) -> tuple[Response, int]:
    force = switch("force")
    try:
        active = current_control().pool.remove(backend_id, at_once=force)
    except KeyError:
        raise _unknown(backend_id) from None
    if active and force:
        text = f"{backend_id} removed, {active} requests in flight are cut off"
        return jsonify(BackendRemoved(message=text, active=active)), 200
    if active:
        text = f"{backend_id} is removed when its requests have ended"
        return jsonify(BackendRemoved(message=text, active=active)), 202
    return jsonify(BackendRemoved(message=f"{backend_id} removed", active=0)), 200


def _describe(backend_id: str) -> BackendView:
    for backend in current_control().pool.snapshot():
        if backend["id"] == backend_id:
            return backend
    raise _unknown(backend_id)


def _unknown(backend_id: str) -> ApiError:
    known = [backend["id"] for backend in current_control().pool.snapshot()]
    return ApiError(404, f"no backend {backend_id[:80]!r}", valid_options=known)

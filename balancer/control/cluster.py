"""The route that tells of the cluster: its members, and how each is doing."""

from __future__ import annotations

import time
from typing import Literal

from flask import Blueprint, Response, jsonify
from typing_extensions import TypedDict

from balancer.cluster.figures import Figures, Load, in_flight, together
from balancer.control.control import Control, WorkerView, current_control

blueprint = Blueprint("cluster", __name__)


class MemberView(Figures):
    """`seen` is when it was heard of last; `this` one answers."""

    name: str
    seen: float
    this: bool


class ClusterState(TypedDict):
    """Whether it hears of the others, and since when; `last_error` says why it does not. It is `single` without a
    redis_url."""

    name: str
    state: Literal["single", "together", "alone"]
    since: float
    last_error: str | None
    members: int


class ClusterView(TypedDict):
    """`redis` is the server, without a password. `workers` are the processes of this balancer. `backends` has requests
    in flight by id, of all members, as the figures in `whole` are."""

    cluster: ClusterState
    redis: str | None
    members: list[MemberView]
    workers: list[WorkerView]
    whole: Load
    backends: dict[str, int]


@blueprint.get("/cluster")
def show_cluster() -> Response:
    control = current_control()
    found = members(control)
    view = ClusterView(
        cluster=state(control),
        redis=None if control.cluster is None else control.cluster.link.address,
        members=found,
        workers=control.workers(),
        whole=together(found),
        backends=in_flight(found),
    )
    return jsonify(view)


def state(control: Control) -> ClusterState:
    cluster = control.cluster
    name = control.settings.cluster
    if cluster is None:
        return {"name": name, "state": "single", "since": control.began, "last_error": None, "members": 1}
    now = cluster.state
    return {
        "name": name,
        "state": "together" if now.is_together else "alone",
        "since": now.since,
        "last_error": now.error,
        "members": len(cluster.members) or 1,
    }


def members(control: Control) -> list[MemberView]:
    """This one first, as it is now; of the others what they have told last."""
    cluster, name = control.cluster, "this"
    if cluster is not None:
        name = cluster.name
    found: list[MemberView] = [{**control.figures(), "name": name, "seen": time.time(), "this": True}]
    for other, member in sorted(cluster.members.items()) if cluster is not None else ():
        if other != name:
            found.append({**member.figures, "name": other, "seen": member.seen, "this": False})
    return found

"""Routes that only tell: how it goes now and went before, the settings in force.

No secret may be in an answer. A reader without a token gets no more of paths than may be seen by everybody on this
machine: of requests the first segment, of files the name.
"""

from __future__ import annotations

import gzip
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from flask import Blueprint, Response, jsonify, request
from prometheus_client.exposition import gzip_accepted
from typing_extensions import TypedDict

from balancer import __version__
from balancer.balancing import strategies
from balancer.balancing.pool import PoolView
from balancer.balancing.strategies import StrategyView
from balancer.config.reload import ConfigView
from balancer.control import cluster
from balancer.control.access import first_segment, is_authorized
from balancer.control.cluster import ClusterState
from balancer.control.control import Lifecycle, ManagedView, StateView, TlsView, current_control
from balancer.control.inputs import whole_number
from balancer.control.metrics import current_metrics
from balancer.control.problems import ApiError
from balancer.control.revisions import Patch
from balancer.fleet.discovery import SourceView
from balancer.fleet.scaler import ScalingView
from balancer.observe.canary import CanaryView
from balancer.observe.events import Event
from balancer.observe.history import SLOTS, WINDOWS, Figures, Slot
from balancer.observe.record import FinishedView, RecentView
from balancer.observe.statistics import NO_REQUESTS, CountersView, StatisticsView

SCHEMA_VERSION = 1
MAX_RECENT = 100
FAST = 1  # of gzip: metrics shrink to a twentieth even so
F = TypeVar("F", bound=FinishedView)

blueprint = Blueprint("monitoring", __name__)


class ServerView(ManagedView, CountersView):
    """A backend and what its requests came to. `websockets` are those that are open. `window`: of the window that was
    asked for, None without a request in it."""

    websockets: int
    window: Figures | None


class WindowView(Figures):
    """`seconds` may be up to 10 more than asked for, or less after a start or a reset."""

    seconds: int


class PoolStatus(PoolView):
    """A pool and what the requests of its backends came to. `until` is when its algorithm ends that is for a time;
    `hedges` are of the process's lifetime."""

    total_requests: int
    failed_requests: int
    until: float | None
    hedges: dict[str, int]


class RouteView(CountersView):
    """A route, and what its requests came to. It leads to a pool, or else to those of `split`, to `redirect` or to
    `answers_with`."""

    name: str
    host: str | None
    path: str
    methods: list[str]
    pool: str | None
    split: dict[str, int] | None
    canary: CanaryView | None
    mirror: str | None
    redirect: str | None
    answers_with: int | None
    auth: list[str]
    limits: list[str]


class TotalsView(StatisticsView):
    queued_requests: int
    access_log_dropped: int
    waiting_requests: int
    unassigned_requests: int
    websockets: int
    window: WindowView | None


class Capabilities(TypedDict):
    """What the reader may do. `writes`: if need be with a token, which a page needs if `token_required`. `authorized`:
    a token came with this request, else paths are cut. `traffic`: this address forwards requests too. `faults`: the
    backends are those of the demo, and can be troubled."""

    writes: bool
    token_required: bool
    authorized: bool
    reload: bool
    traffic: bool
    faults: bool
    algorithms: list[StrategyView]


class Status(TypedDict):
    """`algorithm` and `panic` are those of the pool `default`. If `since` was given and is still known, then
    `backend_servers` is empty, and `changed_backends` has a JSON Merge Patch (RFC 7396) for each that is not as it was
    in that `revision`."""

    schema_version: int
    version: str
    load_balancer_id: str
    algorithm: str
    lifecycle: Lifecycle
    now: float
    uptime: float
    events_seq: int
    panic: bool
    config: ConfigView
    tls: TlsView | None
    state: StateView | None
    cluster: ClusterState
    statistics: TotalsView
    pools: list[PoolStatus]
    sources: list[SourceView]
    backend_servers: list[ServerView]
    revision: int | None
    changed_backends: dict[str, Patch] | None
    routes: list[RouteView]
    scaling: list[ScalingView]
    recent_requests: list[RecentView]
    capabilities: Capabilities


class Alive(TypedDict):
    status: str
    load_balancer_id: str


class Readiness(TypedDict):
    status: str
    lifecycle: Lifecycle


class EventsView(TypedDict):
    events: list[Event]
    latest: int


class HistoryView(TypedDict):
    step: int
    now: float
    points: list[Slot]


@blueprint.get("/status")
def status() -> Response:
    control = current_control()
    recent, seconds = whole_number("recent", 20, MAX_RECENT), whole_number("window", 0, max(WINDOWS))
    if seconds not in (0, *WINDOWS):
        raise ApiError(400, f"window={seconds}: expected one of {', '.join(map(str, WINDOWS))}")
    timed = frozenset(request.args["timed"].split(",")) if "timed" in request.args else None
    window = control.history.window(seconds) if seconds else None
    whole, by_backend, newest = control.statistics.snapshot(recent, timed)
    websockets = control.statistics.websockets.open()
    backends: list[ServerView] = [
        {
            **by_backend.get(backend["id"], NO_REQUESTS),
            **backend,
            "websockets": websockets[backend["id"]],
            "window": None if window is None else window.of(backend["id"], timed is None or backend["id"] in timed),
        }
        for backend in control.backends()
    ]
    if timed is not None:
        for untimed in (each for each in backends if each["id"] not in timed):
            del untimed["health"]["last_check"], untimed["health"]["consecutive_successes"]
    shown = {backend["id"] for backend in backends}
    revision, changed = None, None
    if "since" in request.args:
        revision, changed = control.revisions.since(whole_number("since", 0, 10**15), backends)
    totals: TotalsView = {
        **whole,
        "queued_requests": control.queued(),
        "access_log_dropped": control.log.dropped,
        "waiting_requests": control.pools.waiting,
        "unassigned_requests": sum(c["total_requests"] for key, c in by_backend.items() if key not in shown),
        "websockets": websockets.total(),
        "window": None if window is None else {**window.whole, "seconds": window.seconds},
    }
    return jsonify(
        Status(
            schema_version=SCHEMA_VERSION,
            version=__version__,
            load_balancer_id=control.settings.id,
            algorithm=control.pool.algorithm,
            lifecycle=control.lifecycle,
            now=time.time(),
            uptime=time.monotonic() - control.started,
            events_seq=control.events.latest,
            panic=control.pool.is_panicking,
            config=control.configuration.summary(is_authorized()),
            tls=_tls(),
            state=_state(),
            cluster=cluster.state(control),
            statistics=totals,
            pools=_pools(backends),
            sources=_sources(),
            backend_servers=backends if changed is None else [],
            revision=revision,
            changed_backends=changed,
            routes=_routes(),
            scaling=control.scaling.describe(),
            recent_requests=[_shown(record) for record in newest],
            capabilities=_capabilities(),
        )
    )


def _pools(backends: Sequence[ServerView]) -> list[PoolStatus]:
    requests, failed = Counter[str](), Counter[str]()
    for backend in backends:
        requests[backend["pool"]] += backend["total_requests"]
        failed[backend["pool"]] += backend["failed_requests"]
    control = current_control()
    ends, hedges = control.decisions.ends(), control.statistics.hedges()
    return [
        {
            **pool,
            "total_requests": requests[pool["name"]],
            "failed_requests": failed[pool["name"]],
            "until": ends.get((pool["name"], "")),
            "hedges": hedges[pool["name"]],
        }
        for pool in control.pools.describe()
    ]


def _routes() -> list[RouteView]:
    control = current_control()
    counted = control.routes.since_reset()
    return [
        {
            **(counted[route.name].describe() if route.name in counted else NO_REQUESTS),
            "name": route.name,
            "host": route.host,
            "path": route.path,
            "methods": list(route.methods),
            "pool": route.pool,
            "split": route.split or None,
            "canary": canary.describe() if (canary := control.canaries.of(route.name)) is not None else None,
            "mirror": route.mirror.pool if route.mirror is not None else None,
            "redirect": route.redirect,
            "answers_with": route.status,
            "auth": list(route.auth),
            "limits": list(route.limits),
        }
        for route in control.settings.routes
    ]


def _tls() -> TlsView | None:
    control = current_control()
    view = control.tls()
    if view is not None and view["last_error"] is not None and not is_authorized():
        view["last_error"] = control.configuration.without_folders(view["last_error"])
    return view


def _state() -> StateView | None:
    control = current_control()
    memory = control.memory
    if memory is None:
        return None
    told = str if is_authorized() else control.configuration.without_folders
    return {"file": told(str(memory.path)), "last_error": memory.last_error and told(memory.last_error)}


def _sources() -> list[SourceView]:
    control = current_control()
    told = str if is_authorized() else control.configuration.without_folders
    found = control.discovery.describe()
    return [{**source, "last_error": source["last_error"] and told(source["last_error"])} for source in found]


def _shown(record: F) -> F:
    if not is_authorized():
        record["path"] = first_segment(record["path"])
        record["subject"] = None
    return record


def _capabilities() -> Capabilities:
    control = current_control()
    access, settings = control.access, control.settings
    return {
        "writes": access.may_write(),
        "token_required": access.has_tokens,
        "authorized": is_authorized(),
        "reload": control.configuration.can_reload,
        "traffic": settings.control_port is None,  # a port of its own forwards nothing
        "faults": settings.demo_faults,
        "algorithms": strategies.describe(),
    }


@blueprint.get("/health")
@blueprint.get("/livez")
def health() -> Response:
    return jsonify(Alive(status="healthy", load_balancer_id=current_control().settings.id))


@blueprint.get("/readyz")
def ready() -> tuple[Response, int]:
    control = current_control()
    is_ready = control.is_serving()
    answer = Readiness(status="ready" if is_ready else "not ready", lifecycle=control.lifecycle)
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
    return jsonify(control.configuration.describe(control.decisions, is_authorized()))


@blueprint.get("/events")
def events() -> Response:
    newer, latest = current_control().events.since(whole_number("since", 0, 10**15), is_authorized())
    return jsonify(EventsView(events=newer, latest=latest))


@blueprint.get("/metrics")
def metrics() -> Response:
    accept, encoding = request.headers.get("Accept", ""), request.headers.get("Accept-Encoding", "")
    text, content_type = current_metrics().text(accept, request.args.getlist("name[]"))
    if not gzip_accepted(encoding):
        return Response(text, content_type=content_type)
    headers = {"Content-Encoding": "gzip"}
    return Response(gzip.compress(text, FAST), content_type=content_type, headers=headers)


@blueprint.get("/history")
def history() -> Response:
    step, since = whole_number("step", 1, 10**6), whole_number("since", 0, 10**15)
    if step not in SLOTS:
        raise ApiError(400, f"step={step}: expected one of {', '.join(map(str, SLOTS))}")
    return jsonify(HistoryView(step=step, now=time.time(), points=current_control().history.since(step, since)))

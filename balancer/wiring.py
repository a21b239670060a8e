"""The only wiring: makes the parts from the settings and says which knows which."""

from __future__ import annotations

import logging
import os
import secrets
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from balancer import __version__
from balancer.balancing import strategies
from balancer.balancing.backends import Backend
from balancer.balancing.changes import Change, Severity
from balancer.balancing.counts import BackendCounts
from balancer.balancing.ejection import KeptEjection
from balancer.balancing.pool import DEFAULT_POOL, BackendPool
from balancer.balancing.pools import Pools
from balancer.balancing.shared import SharedLoads
from balancer.commands import shipped
from balancer.config.comparison import NOTHING, compare
from balancer.config.decisions import Decision, Decisions
from balancer.config.reload import Configuration
from balancer.config.routes import RouteSettings
from balancer.config.settings import Settings
from balancer.control import paths
from balancer.control.control import Control, Reload, TlsView, this_process
from balancer.edge.renewal import Renewal
from balancer.edge.tls import Certificate, TlsOptions
from balancer.edge.workers import WorkerPool
from balancer.edge.wsgi import ReverseProxy
from balancer.errors import SettingsError
from balancer.filters.authentication import Authentication
from balancer.filters.headers import ServedBy
from balancer.filters.limit import LimitOptions
from balancer.filters.limits import Limiter
from balancer.filters.maxforwards import MaxForwards
from balancer.filters.mirror import Copies
from balancer.filters.serviceworkers import ServiceWorkers
from balancer.filters.sharedlimit import Asked
from balancer.filters.sticky import Sticky, cookie_of
from balancer.fleet import sources as sources_of
from balancer.fleet.discovery import Discovery, Found
from balancer.fleet.health import HealthChecker
from balancer.fleet.providers import Providers
from balancer.fleet.scaler import Scaling
from balancer.fleet.scaling import Note as ScalingNote
from balancer.fleet.scaling import ScalingNews
from balancer.forwarding import race
from balancer.forwarding.filter import Filter
from balancer.forwarding.route import Route, RouteOptions, Routes
from balancer.observe.accesslog import AccessLog, LogOptions
from balancer.observe.canary import Canaries
from balancer.observe.events import EventKind, Events, KeptEvent
from balancer.observe.history import History, Reading
from balancer.observe.logwriter import LogWriter, standard_output
from balancer.observe.plain import fill, plain
from balancer.observe.routecounts import RouteCounts
from balancer.observe.statistics import Statistics
from balancer.poolwiring import PoolParts, PoolWiring
from balancer.protocol.files import read_whole
from balancer.protocol.requestheads import RequestHeads
from balancer.protocol.responseheads import ResponseHeads
from balancer.protocol.texts import quoted
from balancer.routewiring import Guards, RouteWiring, Way, check_expectations
from balancer.upstream.dialer import Dialer, tls_context
from balancer.upstream.names import Names

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication
    from flask import Flask

    from balancer.cluster.cluster import Cluster
    from balancer.cluster.figures import Figures
    from balancer.edge.port import Port
    from balancer.state.memory import Memory

log = logging.getLogger("balancer")

# What a reload may change that was decided before.
DECIDED = frozenset({"backend_changed", "backend_added", "backend_removed", "algorithm_changed"})
DOCKER = "unix:///var/run/docker.sock"
ERRORS = frozenset[EventKind]({"certificate_refused", "state_failed", "worker_lost"})  # of what parts have to tell
WARNINGS = frozenset[EventKind](
    {
        *("certificate_expires", "canary_returned", "name_kept", "keys_kept", "source_failed", "cluster_lost"),
        *("decision_left_out", "start_failed", "scaling_failed", "backend_ended"),
    }
)


@dataclass(frozen=True, slots=True)
class Own:
    """Parts that are others where several processes make one balancer. `loads` are then those of all, `certificate`
    was loaded by the master, which has the control API that `control_app` asks and that has these `control_paths`;
    `take` counts what the others have counted."""

    statistics: Statistics = field(default_factory=Statistics)
    routes: RouteCounts = field(default_factory=RouteCounts)
    events: Events = field(default_factory=Events)
    health: Callable[[Callable[[], None]], HealthChecker] = HealthChecker
    loads: SharedLoads | None = None
    certificate: Certificate | None = None
    salt: bytes | None = None  # of limits that all of them hold together
    take: Callable[[], None] = lambda: None
    control_app: WSGIApplication | None = None
    control_paths: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a LoadBalancer starts and stops. `control_app` is the control API alone; `app`, where it is of our own, with
    the proxy in front."""

    app: Flask | None
    control_app: WSGIApplication
    proxy: ReverseProxy
    control: Control
    pools: PoolWiring
    copies: Copies
    workers: WorkerPool
    renewal: Renewal
    authentication: Authentication
    memory: Memory | None
    scaling: Scaling
    routes: Callable[[Settings], Routes]


def make(
    config: Settings,
    sources: Mapping[str, str] | None,
    filters: Sequence[Filter],
    reload: Reload,
    renew: Callable[[], None],
    ports: Callable[[], Sequence[Port]],
    own: Own | None = None,
) -> Parts:
    """`sources` says where each setting came from; `filters` are asked about each request that is to be forwarded, in
    their order; `renew` is called for each new certificate; `ports` are those that are listened on by then. Raises
    SettingsError for an unknown algorithm, an unreadable CA file or a certificate that cannot be used."""
    own = own or Own()
    if own.control_app is None:  # else the one that is used is loaded
        strategies.load_entry_points()
    pseudonym = f"{config.id}.{secrets.token_hex(4)}"  # this very process: two of one name in a chain are not a loop
    configuration = Configuration(config, sources)
    statistics, events = own.statistics, own.events
    tls = _tls_context(config.ca_file)
    note, note_files = noting(events), noting(events, configuration.without_folders)
    dialer = Dialer(tls, Names(note))
    wired = PoolWiring(dialer, statistics, own.health, own.loads)
    wired.use(config, compare(NOTHING, config, configuration.sources, wired.pools).pools)
    authentication = Authentication(dialer, note, statistics.refusals)
    authentication.check(config.auth, config.networks)
    authentication.use()

    canaries, discovery = Canaries(note), Discovery(wired.pools, note_files)
    decisions = Decisions(lambda: configuration.settings, wired.pools, note)
    history, writer = History(lambda: _look(own.take, statistics, wired.pools)), LogWriter(standard_output())
    workers = WorkerPool(config.max_threads, config.max_queued, config.thread_idle_timeout)
    limiter = Limiter(events, salt=own.salt or _salt(config))
    renewal = Renewal(config.options(TlsOptions), renew=renew, note=note_files, certificate=own.certificate)
    providers = Providers(wired.pools, config.id, tls, lambda: _docker(configuration.settings))
    scaling = Scaling(wired.pools, providers.make, _scaled(note))
    control = Control(
        *(wired.pools, statistics, events, history, writer, shipped.find("dashboard.html")),
        *(configuration, decisions, own.routes, limiter, discovery),
        canaries=canaries,
        scaling=scaling,
        idle=wired.idle,
        queued=lambda: workers.queued,
        reload=reload,
        tls=lambda: _tls(renewal, ports()),
        figures=lambda: _figures(control),
    )
    control.workers = lambda: [this_process(control.began)]
    control.memory = _memory(control)
    control.cluster = None if own.salt else _cluster(control, pseudonym, wired.health.check_soon)
    wired.look = lambda: _pass_time(control)
    app, control_app, control_paths = None, own.control_app, own.control_paths
    if control_app is None:
        from balancer.control import api, openapi  # and with them Flask, which a worker does without

        app, control_paths = api.make(control), openapi.PATHS
        control_app = app.wsgi_app
    copies = Copies(control.routes)
    routes = _routes(control, control_paths, wired, filters, copies, authentication)
    proxy = _proxy(control_app, control_paths, control, routes(config), authentication, pseudonym)
    check_expectations(config, proxy.heads, proxy.is_control)
    if app is not None:
        app.wsgi_app = proxy  # type: ignore[method-assign]
    wired.tell = _follow(control, wired)
    return Parts(
        *(app, control_app, proxy, control, wired, copies, workers, renewal, authentication),
        *(control.memory, scaling, routes),
    )


def use_single(control: Control, config: Settings) -> None:
    """What there is once, however many worker processes there are, is as these settings have it. Raises SettingsError
    for what needs a library that is missing."""
    control.discovery.use(sources_of.made(config, control.discovery.is_lost))
    control.scaling.use(config.scaling)
    control.access.use(config)


def _docker(config: Settings) -> str:
    return config.docker or os.environ.get("DOCKER_HOST") or DOCKER


class Note(Protocol):
    """What a part has to tell becomes an event, and a line of the log."""

    def __call__(self, kind: EventKind, text: str, backend: str | None = None) -> None: ...


def noting(events: Events, public: Callable[[str], str] | None = None) -> Note:
    """`public` makes the text for readers without a token."""

    def note(kind: EventKind, text: str, backend: str | None = None) -> None:
        severity: Severity = "error" if kind in ERRORS else "warning" if kind in WARNINGS else "info"
        events.add(kind, backend, text, severity, public=None if public is None else public(text))
        _log_event(severity, kind, backend, text)

    return note


def _log_event(severity: Severity, kind: EventKind, backend: str | None, text: str) -> None:
    log.log(logging.getLevelName(severity.upper()), "%s: %s", " ".join(filter(None, (kind, backend))), text)


def _scaled(note: Note) -> ScalingNote:
    def tell(kind: ScalingNews, pool: str, backend: str | None, text: str) -> None:
        note(kind, text if pool == DEFAULT_POOL else f"{text}, pool {pool}", backend)

    return tell


def _tls_context(ca_file: Path | None) -> ssl.SSLContext | None:
    """None for the system's CAs, which are loaded when the first https backend needs them."""
    if ca_file is None:
        return None
    try:
        read_whole(ca_file)  # of which the ssl module would wait for a writer, if it is a pipe
        return tls_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        what = "holds no whole certificate" if isinstance(error, ssl.SSLError) else error
        raise SettingsError(f"ca_file {quoted(str(ca_file))}: {what}; expected a PEM file") from None


def _pass_time(control: Control) -> None:
    control.decisions.undo()
    control.canaries.look()
    if control.cluster is not None:
        control.cluster.pass_time()


def _figures(control: Control) -> Figures:
    """What the others are told of this one."""
    from balancer.cluster.figures import busiest, load_of

    return {
        **load_of(control.statistics, control.history),
        "id": control.settings.id,
        "url": control.url(),
        "since": control.began,
        "version": __version__,
        "lifecycle": control.lifecycle,
        "processes": max(1, len(control.workers())),
        "backends": busiest(control.pools),
    }


def _salt(config: Settings) -> bytes | None:
    """The same for all members of a cluster."""
    return blake2b(config.cluster.encode()).digest() if config.is_member else None


def _cluster(control: Control, name: str, check: Callable[[Backend], None]) -> Cluster | None:
    """By `redis_url`. `name` is this very process."""
    config = control.settings
    if config.redis_url is None:
        return None
    try:
        from balancer.cluster.agreement import Agreement
        from balancer.cluster.cluster import Cluster
        from balancer.cluster.link import Link
    except ImportError:
        raise SettingsError("redis_url needs the extra redis: pip install 'python-load-balancer[redis]'") from None

    def look(backend_id: str, is_up: bool) -> None:
        pool = control.pools.pool_of(backend_id)
        backend = None if pool is None else pool.get(backend_id)
        if backend is not None and (backend.health.status == "up") is not is_up:
            check(backend)

    note = noting(control.events)
    link = Link(config.redis_url.get_secret_value(), config.cluster, name)
    agreement = Agreement(control.decisions, name, note)
    limiter = control.limiter

    def asks() -> Iterator[Asked]:
        if charges := limiter.charges():
            yield "", charges, limiter.settle

    cluster = Cluster(
        *(name, link, agreement, asks, limiter.share, control.pools.note_elsewhere),
        *(control.figures, look, note),
    )
    control.decisions.told = cluster.wake
    return cluster


def _memory(control: Control) -> Memory | None:
    """What is kept in the `state_file`, by the names under which it is there."""
    config, events, statistics, pools = control.settings, control.events, control.statistics, control.pools
    if config.state_file is None:
        return None
    from balancer.state.memory import Kept, Memory  # and with it SQLite

    def eject(kept: Mapping[str, Any]) -> None:
        for pool in pools:
            pool.eject(kept)

    def backends() -> dict[str, Any]:
        return {f"{pool.name} {key}": plain(counts) for pool in pools for key, counts in pool.kept_counts().items()}

    def restore_backends(kept: Mapping[str, Any]) -> None:
        counts = {tuple(name.split(" ")): fill(BackendCounts(), each) for name, each in kept.items()}
        for pool in pools:
            pool.restore_counts({backend: each for (name, backend), each in counts.items() if name == pool.name})

    def restore_routes(kept: Mapping[str, Any]) -> None:
        control.routes.restore(kept)
        control.routes.keep([route.name for route in config.routes])

    def whole(read: Callable[[], Any], restore: Callable[[Any], None]) -> Kept:
        """In one value what one part counts."""
        return Kept(lambda: {"all": plain(read())}, lambda kept: restore(kept["all"]))

    kept = {
        "events": Kept(events.kept, lambda kept: events.restore(kept.values()), KeptEvent),
        "sources": Kept(control.discovery.kept, control.discovery.restore, list[Found]),
        "decisions": Kept(control.decisions.kept, control.decisions.restore, Decision),
        "ejections": Kept(
            lambda: {key: each for pool in pools for key, each in pool.ejections().items()}, eject, KeptEjection
        ),
        "backends": Kept(backends, restore_backends),
        "requests": Kept(
            statistics.kept, lambda kept: statistics.restore(kept, {each.id for each in pools.backends()})
        ),
        "routes": Kept(control.routes.kept, restore_routes),
        "websockets": whole(statistics.websockets.totals, statistics.websockets.restore),
        "refusals": whole(statistics.refusals.counts, statistics.refusals.restore),
        "limits": whole(control.limiter.counts, control.limiter.restore),
        "event_counts": whole(events.counts, events.restore_counts),
    }
    return Memory(config.state_file, kept, noting(events, control.configuration.without_folders))


def _tls(renewal: Renewal, ports: Sequence[Port]) -> TlsView | None:
    served = [port.certificate for port in ports] or [renewal.certificate]
    certificate = min(filter(None, served), key=attrgetter("expires_at"), default=None)
    if certificate is None:
        return None
    return {
        "names": list(certificate.names),
        "issuer": certificate.issuer,
        "expires_at": certificate.expires_at,
        "since": certificate.read_at,
        "pending": any(port.is_pending for port in ports),
        "last_error": renewal.last_error,
    }


def _routes(
    control: Control,
    control_paths: Collection[str],
    pools: PoolWiring,
    filters: Sequence[Filter],
    copies: Copies,
    authentication: Authentication,
) -> Callable[[Settings], Routes]:
    """What makes the routes that settings ask for, at the start and at every reload."""
    started_with = control.settings
    access_log = AccessLog(control.log, started_with.options(LogOptions))
    rare: list[Filter] = [MaxForwards()]
    if started_with.control_port is None:  # else the control API is no neighbour of what is forwarded
        rare.append(ServiceWorkers(paths.covers_control_path(control_paths, started_with.control_prefix)))

    def way(parts: PoolParts, heads: ResponseHeads) -> Way:
        """To one pool."""
        config = parts.settings
        usual: list[Filter] = [*([ServedBy()] if config.expose_backend else []), *filters]
        if config.sticky:
            usual.insert(0, Sticky(parts.pool, config.sticky_key, config.sticky_max_age))
        route = Route(
            *(parts.pool, parts.adapter, control.statistics, parts.budget),
            config.options(RouteOptions),
            on_refused=pools.health.wake,
            response_heads=heads,
            done=(
                *((race.noting(parts.pool.hedging),) if config.hedge != "off" else ()),
                *((access_log.done,) if config.access_log else ()),
            ),
        )
        return Way(config, route, usual)

    def routes(config: Settings) -> Routes:
        access_log.options = config.options(LogOptions)
        heads = ResponseHeads(config.response_headers)
        ways = {name: way(parts, heads) for name, parts in pools.parts.items()}
        guards = _guards(config, authentication, control.limiter)
        return RouteWiring(config, ways, rare, guards, control.canaries, copies).routes(control.routes)

    return routes


def _guards(config: Settings, authentication: Authentication, limiter: Limiter) -> Guards:
    """What makes the filters that guard one route: who may (`auth`), and then how much (`limits`)."""
    limiter.use(LimitOptions(**each.model_dump()) for each in config.limits)

    def guards(route: RouteSettings) -> list[Filter]:
        who = [authentication.filter(route.auth)] if route.auth else []
        how_much = [limiter.filter(route.limits, route.name, config.networks)] if route.limits else []
        return [*who, *how_much]

    return guards


def _proxy(
    control_app: WSGIApplication,
    control_paths: Collection[str],
    control: Control,
    routes: Routes,
    authentication: Authentication,
    pseudonym: str,
) -> ReverseProxy:
    config = control.settings
    return ReverseProxy(
        control_app,
        (lambda path: False)
        if config.control_port is not None
        else paths.is_control_path(control_paths, config.control_prefix),
        routes=routes,
        heads=request_heads(config, pseudonym.encode("ascii"), authentication.ours),
    )


def request_heads(config: Settings, pseudonym: bytes, ours: Collection[bytes] = ()) -> RequestHeads:
    return RequestHeads(
        *(pseudonym, config.networks, config.max_header_count, config.request_headers, config.host_field, config.via),
        cookies={cookie_of(name) for name, each in config.by_pool().items() if each.sticky},
        ours=ours,
    )


def _look(take: Callable[[], None], statistics: Statistics, pools: Pools) -> Reading:
    take()
    in_flight = {backend.id: backend.active for backend in pools.backends()}
    return Reading(statistics.lifetime(), in_flight, pools.waiting)


def _follow(control: Control, pools: PoolWiring) -> Callable[[BackendPool, Change], None]:
    """Changes of a pool become events and log lines, and the parts that care are told."""
    statistics, events, health = control.statistics, control.events, pools.health

    def changed(pool: BackendPool, change: Change) -> None:
        if pool.name != DEFAULT_POOL and (not change.backend or change.kind == "backend_added"):
            change = change._replace(text=f"{change.text}, pool {pool.name}")
        events.add(*change)
        _log_event(change.severity, change.kind, change.backend, change.text)
        if (cluster := control.cluster) is not None:
            if change.kind in ("backend_up", "backend_down"):
                cluster.tell_health(change.backend, change.kind == "backend_up")
            elif change.kind in DECIDED:
                cluster.wake()
        if change.kind == "backend_changed":
            health.wake()  # out of maintenance, or somewhere else: nothing is known of it
        elif change.kind == "backend_added":
            statistics.forget(change.backend)  # a failed last request of a removed one is recorded after its removal
            health.wake()
        elif change.kind == "backend_removed":
            statistics.keep([backend.id for backend in pools.pools.backends()])

    return changed

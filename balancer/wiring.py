"""The only wiring: makes the parts from the settings and says which knows which."""

from __future__ import annotations

import atexit
import logging
import secrets
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flask import Flask

from balancer.balancer import Balancer
from balancer.balancing import strategies
from balancer.balancing.changes import Change
from balancer.balancing.pool import BackendPool, PoolChanges
from balancer.config import settings
from balancer.config.reload import Configuration, make_backend
from balancer.config.settings import Settings
from balancer.control import api
from balancer.control.control import Control
from balancer.control.metrics import Metrics, Sources
from balancer.edge.wsgi import ReverseProxy
from balancer.filters.maxforwards import MaxForwards
from balancer.filters.servedby import ServedBy
from balancer.filters.serviceworkers import ServiceWorkers
from balancer.fleet.health import HealthChecker
from balancer.forwarding.filter import Filter
from balancer.forwarding.retrybudget import RetryBudget
from balancer.forwarding.route import Route, Routes
from balancer.observe.accesslog import AccessLog
from balancer.observe.events import Events
from balancer.observe.history import History, Reading
from balancer.observe.logwriter import LogWriter, standard_output
from balancer.observe.statistics import Statistics
from balancer.options import access, pool_options, probe, route_options, timeouts, tls_context
from balancer.protocol.requestheads import RequestHeads
from balancer.protocol.responseheads import ResponseHeads
from balancer.upstream.transport import BackendAdapter

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("balancer")

_PLACES = (Path(__file__).resolve().parents[1], Path(sys.prefix, "share", "load-balancer"))  # checkout, or installed
_PAGES = [place / "dashboard.html" for place in _PLACES]
DASHBOARD = next((page for page in _PAGES if page.exists()), _PAGES[0])


def create_app(
    config: Settings | None = None, sources: Mapping[str, str] | None = None, filters: Sequence[Filter] = ()
) -> Flask:
    """A Flask app whose `wsgi_app` forwards everything but the control paths.

    The Balancer is `app.extensions["balancer"]`; nothing runs until its `start`. `sources` says where each setting came
    from; `filters` are asked about each request that is to be forwarded, in their order. Raises SettingsError for an
    unknown algorithm or an unreadable CA file.
    """
    strategies.load_entry_points()
    configuration = Configuration(config or Settings(), sources)
    config = configuration.settings
    statistics, events = Statistics(), Events()
    pool = BackendPool(strategies.create(config.algorithm), pool_options(config))
    tls = tls_context(config.ca_file)
    adapter = BackendAdapter(timeouts(config), pool_idle_timeout=config.pool_idle_timeout, tls=tls)
    health = _health(config, pool, adapter, tls)
    backends = [make_backend(backend, configuration.sources["backends"]) for backend in config.backends]
    pool.apply(PoolChanges(add=backends))

    app = Flask(__name__, static_folder=None)
    history, writer = History(lambda: _look(statistics, pool)), LogWriter(standard_output())
    control = Control(
        config.id,
        pool,
        statistics,
        events,
        history,
        writer,
        DASHBOARD,
        configuration,
        access(config),
        config.control_prefix,
    )
    control.metrics = Metrics(_sources(control, adapter))
    api.install(app, control)
    control_app = app.wsgi_app
    routes = _routes(control, adapter, health, filters)
    proxy = _proxy(control_app, control, routes(config))
    app.wsgi_app = proxy  # type: ignore[method-assign]
    balancer = Balancer(configuration, control, proxy, control_app, health, adapter, tls, routes)
    control.reload = balancer.reload
    app.extensions["balancer"] = balancer
    _follow(pool, statistics, events, health)
    return app


def started_app() -> Flask:
    """The app as the environment says, for other WSGI servers; it stops when the process ends. Raises SettingsError."""
    config, sources = settings.load({})
    for warning in [*settings.warnings(), *settings.advice(config)]:
        log.warning(warning)
    app = create_app(config, sources)
    balancer: Balancer = app.extensions["balancer"]
    balancer.start()
    atexit.register(balancer.stop)
    return app


def _health(config: Settings, pool: BackendPool, adapter: BackendAdapter, tls: ssl.SSLContext | None) -> HealthChecker:
    def on_round() -> None:
        adapter.close_idle()
        pool.sweep()

    return HealthChecker(pool, probe(config, tls), interval=config.health_interval, on_round=on_round)


def _routes(
    control: Control, adapter: BackendAdapter, health: HealthChecker, filters: Sequence[Filter]
) -> Callable[[Settings], Routes]:
    """What makes the routes that settings ask for, at the start and at every reload."""
    started_with = control.configuration.settings
    budget, access_log = RetryBudget(control.statistics), AccessLog(control.log)
    rare: list[Filter] = [MaxForwards()]
    if started_with.control_port is None:  # else the control API is no neighbour of what is forwarded
        rare.append(ServiceWorkers(api.covers_control_path(started_with.control_prefix)))

    def routes(config: Settings) -> Routes:
        usual = [*([ServedBy()] if config.expose_backend else []), *filters]
        access_log.use(config.access_log_format if config.access_log else None, config.networks)
        route = Route(
            control.pool,
            adapter,
            control.statistics,
            budget,
            route_options(config),
            on_refused=health.wake,
            response_heads=ResponseHeads(config.response_headers),
            done=(access_log.done,) if access_log.is_on else (),
        )
        return Routes(usual=route.with_filters(usual), rare=route.with_filters([*rare, *usual]))

    return routes


def _proxy(control_app: WSGIApplication, control: Control, routes: Routes) -> ReverseProxy:
    config = control.configuration.settings
    # The pseudonym is this very process: two balancers of one name in a chain are not a loop.
    pseudonym = f"{config.id}.{secrets.token_hex(4)}".encode("ascii")
    return ReverseProxy(
        control_app,
        (lambda path: False) if config.control_port is not None else api.is_control_path(config.control_prefix),
        routes=routes,
        heads=RequestHeads(pseudonym, config.networks, config.max_header_count, config.request_headers),
    )


def _sources(control: Control, adapter: BackendAdapter) -> Sources:
    return Sources(
        balancer_id=control.balancer_id,
        pool=control.pool,
        statistics=control.statistics,
        events=control.events,
        adapter=adapter,
        configuration=control.configuration,
        lifecycle=lambda: control.lifecycle,
        queued=lambda: control.queued(),
        log=control.log,
    )


def _look(statistics: Statistics, pool: BackendPool) -> Reading:
    in_flight = {backend.id: backend.active for backend in pool.backends()}
    return Reading(statistics.lifetime(), in_flight, pool.waiting)


def _follow(pool: BackendPool, statistics: Statistics, events: Events, health: HealthChecker) -> None:
    """Changes of the pool become events and log lines, and the parts that care are told."""

    def changed(change: Change) -> None:
        events.add(*change)
        log.log(logging.getLevelName(change.severity.upper()), "%s %s: %s", change.kind, change.backend, change.text)
        if change.kind == "backend_changed":
            health.wake()  # out of maintenance, or somewhere else: nothing is known of it
        elif change.kind == "backend_added":
            statistics.forget(change.backend)  # a failed last request of a removed one is recorded after its removal
            health.wake()
        elif change.kind == "backend_removed":
            statistics.forget(change.backend)

    pool.on_change(changed)

#!/usr/bin/env python3
"""The load balancer: command line and composition root. `python load_balancer.py --help` says how to use it.

`create_app(settings)` returns a Flask app whose `wsgi_app` forwards everything but the control paths; it also runs
under other WSGI servers, as in `waitress-serve load_balancer:app`.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while the imports below run ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # a SIGHUP that comes before `Signals` can react waits, it must not kill
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])

import argparse
import atexit
import contextlib
import logging
import os
import secrets
import select
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flask import Flask

from balancer import __version__, api, server, settings, strategies
from balancer.accesslog import AccessLog
from balancer.bridge import Bridge
from balancer.control import Control
from balancer.ejection import EjectionRules
from balancer.errors import SettingsError
from balancer.events import Events
from balancer.express import Express
from balancer.guard import WriteGuard
from balancer.health import HealthChecker, Probe
from balancer.history import History, Reading
from balancer.logwriter import LogHandler, LogWriter, standard_output
from balancer.metrics import Metrics, Sources
from balancer.outgoing import RequestHeads
from balancer.pool import BackendPool, PoolChanges, PoolOptions
from balancer.proxy import ProxyOptions, ReverseProxy
from balancer.reload import Configuration, Plan, make_backend
from balancer.settings import Settings
from balancer.statistics import Statistics
from balancer.transport import BackendAdapter, Timeouts
from balancer.workers import WorkerPool

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("balancer")

SPARE_DESCRIPTORS = 64  # for everything that is no client's
_PLACES = (Path(__file__).resolve().parent, Path(sys.prefix, "share", "load-balancer"))  # checkout, or installed
DASHBOARD = next((place / "dashboard.html" for place in _PLACES if (place / "dashboard.html").exists()), _PLACES[0])
EXAMPLES = """examples:
  python load_balancer.py                                        three backends on ports 5001 to 5003
  python load_balancer.py --backend http://127.0.0.1:8080        in front of one service of yours
  python load_balancer.py --backend a=http://10.0.0.1:80@3 --backend b=http://10.0.0.2:80@1 --algorithm weighted
  python load_balancer.py --config balancer.toml --check-config

Every setting is a flag, a key of the TOML file and an environment variable: --health-path, health_path, LB_HEALTH_PATH;
backends are --backend, [[backends]] and LB_BACKENDS.
A flag wins over the environment, that over the file, that over the default (in parentheses)."""


@dataclass(slots=True)
class Balancer:
    """The parts that `create_app` wired, for whoever serves the app. `start` and `stop` once each."""

    configuration: Configuration
    control: Control
    proxy: ReverseProxy
    control_app: WSGIApplication
    health: HealthChecker
    adapter: BackendAdapter
    tls: ssl.SSLContext | None
    bridges: list[Bridge] = field(default_factory=list)
    express: Express | None = None

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    def start(self) -> None:
        self.control.log.start()
        self.health.start()
        self.control.history.start()
        if self.express is not None:
            self.express.start()
        self.control.lifecycle = "running"

    def drain(self, text: str) -> None:
        self.control.lifecycle = "draining"
        self.control.events.add("draining", None, text)

    def stop(self) -> None:
        self.control.lifecycle = "draining"
        if self.express is not None:
            self.express.stop()
        self.health.stop()
        self.control.history.stop()
        self.adapter.close()
        self.control.log.stop()

    def reload(self, dry_run: bool = False) -> Plan:
        """Read the configuration again and apply what changed. Raises SettingsError; then nothing has changed."""
        events = self.control.events
        try:
            plan = self.configuration.reload(self.control.pool, self._apply, dry_run=dry_run)
        except SettingsError as error:
            if not dry_run:
                events.add("config_refused", None, str(error), "error")
                log.error("configuration not reloaded: %s", error)
            raise
        if not dry_run:
            text = "; ".join(str(change) for change in plan.changes) or "nothing has changed"
            if plan.needs_restart:
                text += f"; needs a restart: {', '.join(plan.needs_restart)}"
            events.add("config_reloaded", None, text[:1000])
            log.info("configuration reloaded: %s", text)
        return plan

    def hang_up(self) -> None:
        """SIGHUP."""
        with contextlib.suppress(SettingsError):  # `reload` has said why
            self.reload()

    def _apply(self, config: Settings, plan: Plan) -> None:
        """From here on new requests see the new settings.

        Those under way keep their ProxyOptions and RequestHeads; all else they look up at each step anew.
        """
        plan.pool.options = _pool_options(config)
        self.control.pool.apply(plan.pool)
        self.adapter.timeouts = _timeouts(config)
        self.adapter.pool_idle_timeout = config.pool_idle_timeout
        self.health.use(Probe(config.health_path, config.health_timeout, tls=self.tls), config.health_interval)
        self.proxy.options = _proxy_options(config)
        self.proxy.heads = RequestHeads(self.proxy.heads.pseudonym, config.networks)
        self.proxy.access_log = _access_log(config, self.control.log)
        for bridge in self.bridges:
            bridge.idle_timeout = config.idle_timeout
            bridge.min_body_rate = config.min_body_rate
        logging.getLogger().setLevel(config.log_level.upper())


def create_app(config: Settings | None = None, sources: Mapping[str, str] | None = None) -> Flask:
    """Wire the parts. The Balancer is `app.extensions["balancer"]`; nothing runs until its `start`.

    `sources` says where each setting came from. Raises SettingsError for an unknown algorithm or an unreadable CA file.
    """
    strategies.load_entry_points()
    configuration = Configuration(config or Settings(), sources)
    config = configuration.settings
    statistics, events = Statistics(), Events()
    pool = BackendPool(strategies.create(config.algorithm), _pool_options(config))
    tls = _tls_context(config.ca_file)
    adapter = BackendAdapter(_timeouts(config), pool_idle_timeout=config.pool_idle_timeout, tls=tls)
    probe = Probe(config.health_path, config.health_timeout, tls=tls)

    def on_round() -> None:
        adapter.close_idle()
        pool.sweep()

    health = HealthChecker(pool, probe, interval=config.health_interval, on_round=on_round)
    backends = [make_backend(backend, configuration.sources["backends"]) for backend in config.backends]
    pool.apply(PoolChanges(add=backends))

    app = Flask(__name__, static_folder=None)
    history, writer = History(lambda: _look(statistics, pool)), LogWriter(standard_output())
    control = Control(
        config.id, pool, statistics, events, history, writer, DASHBOARD, configuration, config.control_prefix
    )
    token = config.admin_token.get_secret_value() if config.admin_token else None
    guard = WriteGuard(token, frozenset(config.cors_origins), config.allow_file_origin, _is_loopback(config.host))
    api.install(app, control, guard)
    control_app = app.wsgi_app
    is_control = (lambda path: False) if config.control_port else api.is_control_path(config.control_prefix)
    # The pseudonym is this very process: two balancers of one name in a chain are not a loop.
    pseudonym = f"{config.id}.{secrets.token_hex(4)}".encode("ascii")
    proxy = ReverseProxy(
        control_app,
        is_control,
        pool=pool,
        adapter=adapter,
        statistics=statistics,
        options=_proxy_options(config),
        heads=RequestHeads(pseudonym, config.networks),
        access_log=_access_log(config, writer),
        on_refused=health.wake,
    )
    app.wsgi_app = proxy  # type: ignore[method-assign]
    balancer = Balancer(configuration, control, proxy, control_app, health, adapter, tls)
    control.reload = balancer.reload
    control.metrics = Metrics(_sources(control, adapter))
    app.extensions["balancer"] = balancer
    _follow(pool, statistics, events, health)
    return app


def _access_log(config: Settings, writer: LogWriter) -> AccessLog | None:
    return AccessLog(writer, config.access_log_format == "json", config.networks) if config.access_log else None


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

    def changed(kind: str, backend_id: str, text: str, severity: str) -> None:
        events.add(kind, backend_id, text, severity)
        log.log(logging.getLevelName(severity.upper()), "%s %s: %s", kind, backend_id, text)
        if kind == "backend_changed":
            health.wake()  # out of maintenance, or somewhere else: nothing is known of it
        elif kind == "backend_added":
            statistics.forget(backend_id)  # a failed last request of a removed one is recorded after its removal
            health.wake()
        elif kind == "backend_removed":
            statistics.forget(backend_id)

    pool.on_change(changed)


def _timeouts(config: Settings) -> Timeouts:
    return Timeouts(config.connect_timeout, config.response_timeout, config.idle_timeout)


def _pool_options(config: Settings) -> PoolOptions:
    return PoolOptions(
        fall=config.health_fall,
        rise=config.health_rise,
        slow_start=config.slow_start,
        ejection=EjectionRules(
            after=config.eject_after,
            seconds=config.eject_seconds,
            max_seconds=config.eject_max_seconds,
            max_share=config.eject_max_share,
            ends_on_check=config.eject_ends_on_check,
            latency=config.latency_ejection,
            latency_factor=config.latency_ejection_factor,
        ),
        panic_threshold=config.panic_threshold,
        # Who waits for a place may hold a thread, and who holds a place may need one: never all threads may wait.
        queue_limit=min(config.queue_limit, config.max_threads // 2),
        queue_timeout=config.queue_timeout,
    )


def _proxy_options(config: Settings) -> ProxyOptions:
    return ProxyOptions(
        balancer_id=config.id,
        expose_backend=config.expose_backend,
        max_header_count=config.max_header_count,
        max_request_body=config.max_request_body,
        retries=config.retries,
        retry_budget=config.retry_budget,
        retry_budget_minimum=config.retry_budget_minimum,
        request_timeout=config.request_timeout,
    )


def _tls_context(ca_file: Path | None) -> ssl.SSLContext | None:
    """None for the system's CAs, which are loaded when the first https backend needs them."""
    if ca_file is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"ca_file {str(ca_file)!r}: {error.strerror or error}; expected a PEM file") from None


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def __getattr__(name: str) -> Any:
    """`load_balancer:app` for other WSGI servers, made when it is asked for, from the environment."""
    if name != "app":
        raise AttributeError(name)
    for warning in settings.warnings():
        log.warning(warning)
    app = create_app(*settings.load({}))
    balancer: Balancer = app.extensions["balancer"]
    balancer.start()
    atexit.register(balancer.stop)
    globals()["app"] = app
    return app


# The command line.


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage of forty flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="load_balancer.py",
        description="A load balancer: HTTP/1.1 and HTTP/2 in, HTTP backends out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"load-balancer {__version__}")
    parser.add_argument("--check-config", action="store_true", help="check all settings and exit")
    parser.add_argument("--print-config", action="store_true", help="print all settings and where each came from")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    settings.add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after SIGTERM, 130 after Ctrl-C, 2 for bad usage or configuration, 1 if serving failed."""
    parsed = vars(parse_arguments(arguments))
    check, show, file = parsed.pop("check_config"), parsed.pop("print_config"), parsed.pop("config")
    if file is None and (name := os.environ.get("LB_CONFIG", "").strip()):
        file = Path(name)
    for warning in settings.warnings():
        print(f"load_balancer.py: warning: {warning}", file=sys.stderr)
    try:
        config, sources = settings.load(parsed, file=file)
        if show:
            print(settings.describe(config, sources))
            return 0
        app = create_app(config, sources)
        if check:
            server.cpus(config.cpu_affinity)
            print("configuration ok")
            return 0
        if file is not None:
            configuration = app.extensions["balancer"].configuration
            configuration.file, configuration.read = file, lambda: settings.load(parsed, file=file)
        return run(app)
    except SettingsError as error:
        print(f"load_balancer.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"load_balancer.py: {error}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # else Python tries once more at its end
        return 1


def run(app: Flask) -> int:
    """Serve `app` until a signal. Raises SettingsError if it cannot listen."""
    balancer: Balancer = app.extensions["balancer"]
    config = balancer.settings
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[LogHandler(balancer.control.log)],
    )
    listeners = _listen(app.wsgi_app, balancer)
    server.pin(server.cpus(config.cpu_affinity))
    names = ("listening on", "control API on")
    where = ", ".join(f"{name} {_url(listener)}" for name, (_, listener) in zip(names, listeners, strict=False))
    with contextlib.suppress(OSError):  # a full disk, or nobody reads: no reason not to serve
        print(f"{config.id}: {where}", flush=True)
    options = server.ServerOptions(
        max_clients=_client_limit(config),
        header_timeout=config.header_timeout,
        max_header_bytes=config.max_header_bytes,
        drain_timeout=config.drain_timeout,
        shutdown_delay=config.shutdown_delay,
    )
    return server.serve(
        listeners,
        options,
        on_start=balancer.start,
        on_drain=balancer.drain,
        on_stop=balancer.stop,
        on_hangup=balancer.hang_up if balancer.configuration.read is not None else None,
    )


def _listen(app: WSGIApplication, balancer: Balancer) -> list[tuple[Bridge, socket.socket]]:
    """The main bridge and its socket, then the control API's if it has a port of its own; both share the threads."""
    config = balancer.settings
    workers = WorkerPool(config.max_threads, config.max_queued, config.thread_idle_timeout)
    balancer.control.queued = lambda: workers.queued
    if hasattr(select, "epoll"):
        balancer.express = Express(balancer.adapter, workers)
    bridge = Bridge(
        app,
        workers,
        idle_timeout=config.idle_timeout,
        min_body_rate=config.min_body_rate,
        is_control=balancer.proxy.is_control,
        # A WSGI middleware around the proxy must see every request, so there is no way past it then.
        proxy=balancer.proxy if app is balancer.proxy else None,
        express=balancer.express,
    )
    listeners = [(bridge, server.listen(config.host, config.port))]
    if config.control_port is not None:
        control = Bridge(
            balancer.control_app,
            workers,
            idle_timeout=config.idle_timeout,
            min_body_rate=config.min_body_rate,
            is_control=lambda path: True,
        )
        listeners.append((control, server.listen(config.host, config.control_port)))
    balancer.bridges = [bridge for bridge, _ in listeners]
    return listeners


def _client_limit(config: Settings) -> int:
    """`max_clients`, or what the limit of open files allows: a request in flight needs two."""
    room = max(1, server.raise_descriptor_limit() // 2 - SPARE_DESCRIPTORS)
    if room < config.max_clients // 2:
        log.warning("the limit of open files allows %d clients, not max_clients = %d", room, config.max_clients)
    return min(config.max_clients, room)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())

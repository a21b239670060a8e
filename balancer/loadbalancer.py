"""The balancer as one object: it listens, serves, reads its settings again, drains and ends.

In a program of yours: `with LoadBalancer(backends=[...]) as lb: requests.get(lb.url)`. docs/library.md says more.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import select
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

from balancer import wiring
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import BackendPool
from balancer.config import settings
from balancer.config.reload import Plan
from balancer.config.settings import BackendSettings, Settings
from balancer.control.access import AccessOptions
from balancer.edge import process
from balancer.edge.bridge import Bridge
from balancer.edge.express import Express
from balancer.edge.granian import PortOptions
from balancer.edge.listener import ClientLimits
from balancer.edge.port import Port, listen
from balancer.edge.server import Server
from balancer.edge.workers import WorkerPool
from balancer.errors import SettingsError
from balancer.fleet.health import HealthOptions
from balancer.forwarding.filter import Filter
from balancer.observe.events import Event
from balancer.observe.record import ExplainedView
from balancer.upstream.transport import Timeouts

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed.wsgi import WSGIApplication
    from flask import Flask

log = logging.getLogger("balancer")

SPARE_DESCRIPTORS = 64  # for everything that is no client's
DRAIN_SECONDS = 1.0  # of `stop`, unless it is told otherwise: somebody waits for it


class LoadBalancer:
    """A load balancer in this process, in threads of its own. It starts once and stops once.

    Each of `backends` is a URL, `[ID=]URL[@WEIGHT]`, a dict or a BackendSettings. Every setting can be given by name;
    the others have their defaults, but `port`, which is any free one. Neither a file nor the environment is read.
    `config` are settings that are checked already, `sources` where each came from. `filters` are asked in their order.
    Raises SettingsError, in one line.

    `app` is the Flask app of the control API, whose `wsgi_app` forwards everything else.
    """

    def __init__(
        self,
        backends: str | Iterable[str | Mapping[str, Any] | BackendSettings] = (),
        *,
        config: Settings | None = None,
        sources: Mapping[str, str] | None = None,
        filters: Sequence[Filter] = (),
        **values: Any,
    ) -> None:
        if config is None:
            listed = backends if isinstance(backends, str) else list(backends)
            config, sources = settings.given({"port": 0, "backends": listed, **values})
        parts = wiring.make(config, sources, filters, self.reload)
        self.app, self.control_app, self.proxy = parts.app, parts.control_app, parts.proxy
        self.control, self.health, self.workers, self.routes = parts.control, parts.health, parts.workers, parts.routes
        self.configuration, self.adapter = parts.control.configuration, parts.control.adapter
        self.app.extensions["balancer"] = self
        self.express: Express | None = None
        self.bridges: list[Bridge] = []
        self._server: Server | None = None  # once it listens
        self._thread: Thread | None = None
        self._started: Future[None] = Future()
        self._ending: Future[float] = Future()  # seconds for what is in flight

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    # What it does, for whoever asks.

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Where it listens; the second one is the control API's, if it has a port of its own."""
        if self._server is None:
            raise RuntimeError("it does not listen yet: start() comes first")
        return [port.url for port in self._server.ports]

    @property
    def pool(self) -> BackendPool:
        return self.control.pool

    def events(self, since: int = 0) -> list[Event]:
        """What `GET /events` tells, oldest first."""
        return self.control.events.since(since)[0]

    def requests(self, recent: int = 20) -> list[ExplainedView]:
        """The newest finished requests, newest first, and why each went where it went, as `GET /requests/ID` tells."""
        return [record.explain() for record in self.control.statistics.newest(recent)]

    # In a thread of its own.

    def start(self) -> Self:
        """Serve from now on. Raises SettingsError if it cannot listen."""
        if self._thread is not None or self._ending.done():
            raise RuntimeError("a LoadBalancer starts once; make a new one")
        self.listen()
        self._thread = Thread(target=self._run, name="load-balancer", daemon=True)
        self._thread.start()
        self._started.result()
        atexit.register(self.stop)
        return self

    def stop(self, timeout: float = DRAIN_SECONDS) -> None:
        """Let what is in flight finish, for so many seconds at most, and end: every thread, every socket. What it did
        can still be asked for."""
        with contextlib.suppress(InvalidStateError):  # it was called before
            self._ending.set_result(timeout)
            if self._thread is None and self._server is not None:
                self._server.close()
        if self._thread is not None:
            self._thread.join()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        assert self._server is not None
        try:
            if not self._server.run(self._serve(self._server)):
                log.error("stopped, but some client connections did not end")
        except BaseException as error:
            if self._started.done():
                log.exception("serving failed")
            else:
                self._started.set_exception(error)

    async def _serve(self, server: Server) -> bool:
        server.start()
        self._started.set_result(None)
        return await server.end("stop()", await asyncio.wrap_future(self._ending))

    # As a process of its own.

    def serve(self) -> int:
        """Serve until a signal, and take the process for it: signals, CPUs, garbage collector, its end. Returns the
        exit code. Raises SettingsError if it cannot listen."""
        process.raise_descriptor_limit()
        self.listen()
        assert self._server is not None
        config = self.settings
        process.pin(process.cpus(config.cpu_affinity))
        return process.serve(
            self._server,
            drain_timeout=config.drain_timeout,
            shutdown_delay=config.shutdown_delay,
            on_hangup=self.hang_up if self.configuration.read is not None else None,
        )

    # What both do.

    def listen(self) -> None:
        """Open the sockets, so that `url` is known; done by `start` and `serve` unless it was before."""
        if self._server is not None:
            return
        config = self.settings
        listeners = [listen(config.host, config.port)]
        if config.control_port is not None:
            try:
                listeners.append(listen(config.host, config.control_port))
            except SettingsError:
                listeners[0].close()
                raise
        options = replace(config.options(PortOptions), max_clients=_client_limit(config))
        self.bridges = self.make_bridges()
        ports = [Port(bridge, listener, options) for bridge, listener in zip(self.bridges, listeners, strict=True)]
        self._server = Server(ports, on_start=self.start_parts, on_drain=self.drain, on_stop=self.stop_parts)

    def make_bridges(self) -> list[Bridge]:
        """The main one, and the control API's if it has a port of its own; both share the threads."""
        config = self.settings
        limits = config.options(ClientLimits)
        if hasattr(select, "epoll"):
            self.express = Express(self.adapter, self.workers)
        is_wrapped = self.app.wsgi_app is not self.proxy
        bridges = [
            Bridge(
                self.app.wsgi_app,
                self.workers,
                limits,
                is_control=self.proxy.is_control,
                # A WSGI middleware around the proxy must see every request, so there is no way past it then.
                proxy=None if is_wrapped else self.proxy,
                express=self.express,
            )
        ]
        if config.control_port is not None:
            bridges.append(Bridge(self.control_app, self.workers, limits, is_control=lambda path: True))
        return bridges

    def start_parts(self) -> None:
        """All but the sockets, which another WSGI server has."""
        self.control.log.start()
        self.health.start()
        self.control.history.start()
        if self.express is not None:
            self.express.start()
        self.control.lifecycle = "running"

    def drain(self, text: str) -> None:
        self.control.lifecycle = "draining"
        self.control.events.add("draining", None, text)

    def stop_parts(self) -> None:
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
                public = self.configuration.without_folders(str(error))
                events.add("config_refused", None, str(error), "error", public=public)
                log.error("configuration not reloaded: %s", error)
            raise
        if not dry_run:
            text = "; ".join(str(change) for change in plan.changes) or "nothing has changed"
            if plan.needs_restart:
                text += f"; needs a restart: {', '.join(plan.needs_restart)}"
            events.add("config_reloaded", None, text)
            log.info("configuration reloaded: %s", text)
        return plan

    def hang_up(self) -> None:
        """SIGHUP."""
        with contextlib.suppress(SettingsError):  # `reload` has said why
            self.reload()

    def _apply(self, config: Settings, plan: Plan) -> None:
        """From here on new requests see the new settings.

        Those under way keep their Route and RequestHead; all else they look up at each step anew.
        """
        plan.pool.options = config.options(PoolOptions)
        self.control.pool.apply(plan.pool)
        self.adapter.use(config.options(Timeouts), config.backend_sni)
        self.health.use(config.options(HealthOptions))
        self.proxy.routes = self.routes(config)
        self.proxy.heads = wiring.request_heads(config, self.proxy.heads.pseudonym)
        self.control.access.options = config.options(AccessOptions)
        for bridge in self.bridges:
            bridge.limits = config.options(ClientLimits)
        logging.getLogger().setLevel(config.log_level.upper())


def create_app(
    config: Settings | None = None, sources: Mapping[str, str] | None = None, filters: Sequence[Filter] = ()
) -> Flask:
    """A Flask app whose `wsgi_app` forwards everything but the control paths.

    Its LoadBalancer is `app.extensions["balancer"]`; nothing runs until that starts. Raises SettingsError.
    """
    return LoadBalancer(config=config or Settings(), sources=sources, filters=filters).app


def started_app() -> Flask:
    """The app as the environment says, for other WSGI servers; it stops when the process ends. Raises SettingsError."""
    config, sources = settings.load({})
    for warning in [*settings.warnings(), *settings.advice(config)]:
        log.warning(warning)
    balancer = LoadBalancer(config=config, sources=sources)
    balancer.start_parts()
    atexit.register(balancer.stop_parts)
    return balancer.app


def serve_app(
    app: WSGIApplication,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    threads: int = 512,
    on_listen: Callable[[str], None] = lambda url: print(f"listening on {url}", flush=True),
    on_drain: Callable[[], None] = lambda: None,
) -> int:
    """Serve a WSGI app over HTTP/1.1 and HTTP/2 until a signal, as a process of its own; returns the exit code.

    So many requests at once have a thread each, as many more wait. `on_listen` gets the URL. `on_drain` runs when a
    signal has come: requests that wait for something of the app's own should end then. Raises SettingsError if it
    cannot listen. `environ["balancer.client"].is_gone` says whether the client of a request has left.
    """
    config = Settings()  # by default
    workers = WorkerPool(threads, threads, config.thread_idle_timeout)
    bridge = Bridge(app, workers, config.options(ClientLimits))
    served = Port(bridge, listen(host, port), config.options(PortOptions))
    on_listen(served.url)
    return process.serve(
        Server([served], on_drain=lambda text: on_drain()),
        drain_timeout=config.drain_timeout,
        shutdown_delay=config.shutdown_delay,
    )


def _client_limit(config: Settings) -> int:
    """`max_clients`, or what the limit of open files allows: a request in flight needs two."""
    room = max(1, process.descriptor_limit() // 2 - SPARE_DESCRIPTORS)
    if room < config.max_clients // 2:
        log.warning("the limit of open files allows %d clients, not max_clients = %d", room, config.max_clients)
    return min(config.max_clients, room)

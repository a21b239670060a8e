"""The balancer as one object: it listens, serves, reads its settings again, drains and ends.

In a program of yours: `with LoadBalancer(backends=[...]) as lb: requests.get(lb.url)`. docs/library.md says more.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from enum import Enum
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, Self

from balancer import wiring
from balancer.balancing.changes import ACTOR
from balancer.balancing.pool import BackendPool
from balancer.config import settings, validation
from balancer.config.comparison import Change, Plan
from balancer.config.settings import Settings
from balancer.config.values import BackendSettings
from balancer.edge import handover, process, tcpsocket, unixsocket
from balancer.edge.bridge import Bridge
from balancer.edge.express import Express
from balancer.edge.handover import Handed
from balancer.edge.listener import ClientLimits, PortOptions
from balancer.edge.redirect import redirect_to
from balancer.edge.server import Server
from balancer.edge.sockets import Sockets
from balancer.edge.tls import Certificate, TlsOptions
from balancer.edge.upgrade import Predecessor, Successor
from balancer.edge.workers import WorkerPool
from balancer.errors import SettingsError
from balancer.forwarding.filter import Filter
from balancer.observe.events import Event
from balancer.observe.record import ExplainedView
from balancer.protocol.addresses import UNIX
from balancer.routewiring import check_expectations

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed.wsgi import WSGIApplication
    from flask import Flask

    from balancer.edge.port import Port

log = logging.getLogger("balancer")

SPARE_DESCRIPTORS = 64  # for everything that is no client's
ONCE = "a LoadBalancer starts or serves once; make a new one"
LOOK_SECONDS = 0.05  # from one look whether its backends are known to the next
DRAIN_SECONDS = 1.0  # of `stop`, unless it is told otherwise: somebody waits for it


State = Enum("State", ["NEW", "LISTENING", "RUNNING", "STOPPED"])  # in this order, each once at most


class Addressed(Protocol):
    """Whatever says where a backend is, such as a BackendSettings."""

    @property
    def id(self) -> str: ...

    @property
    def url(self) -> str: ...


Given = str | Mapping[str, Any] | Addressed


class LoadBalancer:
    """A load balancer in this process, in threads of its own. It starts once and stops once.

    Each of `backends` is a URL, `[ID=]URL[@WEIGHT]`, a dict or an object with these attributes. Every setting can be
    given by name; the others have their defaults, but `port`, which is any free one. Neither a file nor the environment
    is read. `config` are all settings, checked already, and `sources` where each came from: nothing is given beside it.
    `filters` are asked in their order. Raises SettingsError, in one line.

    `app` is the Flask app of the control API, whose `wsgi_app` forwards everything else.

    `_lock` guards `_state`, `_server` and `_thread`, which are set once each, and that `_ending` is. Whoever makes it
    RUNNING also closes everything; before that `stop` does. A signal may call `stop` at any time, so it is an RLock.
    """

    def __init__(
        self,
        backends: Given | Iterable[Given] | None = None,
        *,
        config: Settings | None = None,
        sources: Mapping[str, str] | None = None,
        filters: Iterable[Filter] | None = None,
        **values: Any,
    ) -> None:
        if config is None:
            config, sources = settings.given({"port": 0, "backends": _listed(backends), **values})
            if config.workers != 1:
                raise SettingsError(
                    f"workers = {config.workers}: a program has one; the command load-balancer has more"
                )
        elif not isinstance(config, Settings):
            raise SettingsError(f"config = {validation.shown(config)}: expected Settings; a file is not read")
        elif backends is not None or values:
            beside = ", ".join((["backends"] if backends is not None else []) + list(values))
            raise SettingsError(f"config has all settings, but {beside} came beside it; give either")
        self._server: Server | None = None  # once it listens
        self._listeners: Handed = {}
        parts = self.make(config, sources, _checked(filters))
        self._app, self.control_app, self.proxy = parts.app, parts.control_app, parts.proxy
        self.control, self.pools, self.workers, self.routes = parts.control, parts.pools, parts.workers, parts.routes
        self.copies, self.memory = parts.copies, parts.memory
        self.cluster = parts.control.cluster
        self.control.url = lambda: None if self._server is None else self.url
        self.is_forgetful = False  # what was decided before counts no more
        self.predecessor: Predecessor | None = None  # the process whose place this one takes
        self.is_command = False  # started as one, which can be started once more
        self.configuration, self.renewal = parts.control.configuration, parts.renewal
        self.authentication, self.scaling = parts.authentication, parts.scaling
        if parts.app is not None:
            parts.app.extensions["balancer"] = self
        self.port_options = config.options(PortOptions)
        self.express: Express | None = None
        self.sockets: Sockets | None = None
        self.bridges: list[Bridge] = []
        self._lock = threading.RLock()
        self._state = State.NEW
        self._thread: Thread | None = None  # which serves, if `start` has made it
        self._ending: Future[float] = Future()  # seconds for what is in flight
        self._ended = threading.Event()  # `_thread` has closed everything
        self.use_single_parts(config)

    def make(self, config: Settings, sources: Mapping[str, str] | None, filters: Sequence[Filter]) -> wiring.Parts:
        return wiring.make(config, sources, filters, self.reload, self.renew, self.ports)

    @property
    def app(self) -> Flask:
        assert self._app is not None, "a worker has none"
        return self._app

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    # What it does, for whoever asks.

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def urls(self) -> list[str]:
        """Where it listens; the second one is the control API's, if it has a port of its own, and the last one is
        `http_redirect_port`, if there is one."""
        if self._server is None:
            raise RuntimeError("it does not listen yet: start() comes first")
        return [port.url for port in self._server.ports]

    @property
    def pool(self) -> BackendPool:
        """The default one."""
        return self.control.pool

    def events(self, since: int = 0) -> list[Event]:
        """What `GET /events` tells, oldest first."""
        return self.control.events.since(since)[0]

    def requests(self, recent: int = 20) -> list[ExplainedView]:
        """The newest finished requests, newest first, and why each went where it went, as `GET /requests/ID` tells."""
        if not isinstance(recent, int) or recent < 0:
            raise SettingsError(f"recent = {validation.shown(recent)}: expected a whole number, 0 or more")
        return [record.explain() for record in self.control.statistics.newest(recent)]

    def told(self) -> list[str]:
        """What else is worth a word when it starts."""
        return []

    def advice(self) -> list[str]:
        """A line for each setting that does not do what its owner may expect of it."""
        certificate = self.renewal.certificate
        return [*settings.advice(self.settings), *(certificate.advice() if certificate else [])]

    # In a thread of its own.

    def start(self) -> Self:
        """Serve from now on. Raises SettingsError if it cannot listen."""
        self.listen()
        started: Future[bool] = Future()
        try:
            atexit.register(self.stop)
            Thread(target=self._run, args=(started,), name="load-balancer", daemon=True).start()
            is_ours = started.result()
        except BaseException:  # Ctrl-C as well: nobody has it, so nobody else would stop it
            self.stop(0)
            raise
        if not is_ours:
            raise RuntimeError(ONCE)
        return self

    def stop(self, timeout: float = DRAIN_SECONDS) -> None:
        """Let what is in flight finish, for so many seconds at most, and end: every thread, every socket. Who calls it
        again waits as well, and the shortest time counts. What it did can still be asked for."""
        if not isinstance(timeout, int | float) or not timeout >= 0:  # neither is NaN
            raise SettingsError(f"timeout = {validation.shown(timeout)}: expected a number of seconds, 0 or more")
        with self._lock:
            if self._state is State.RUNNING and self._thread is None:
                raise RuntimeError("serve() has this process, and ends by a signal such as SIGTERM")
            if self._state is State.RUNNING:
                assert self._server is not None
                self._server.limit(timeout)
                if not self._ending.done():
                    self._ending.set_result(timeout)
            else:
                if self._state is State.LISTENING:
                    assert self._server is not None
                    self._server.close()
                self._state = State.STOPPED
        if self._thread is not None:
            self._ended.wait()  # a Ctrl-C in `join` can make Python take the thread for ended
            self._thread.join()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, started: Future[bool]) -> None:
        """The thread. It may come late: then another has begun, or it was stopped."""
        server = self._begin(threading.current_thread())
        if server is None:
            started.set_result(False)
            return
        try:
            if not server.run(self._serve(server, started)):
                log.error("stopped, but some client connections did not end")
        except BaseException as error:
            if started.done():
                log.exception("serving failed")
            else:
                started.set_exception(error)
        finally:
            self._state = State.STOPPED
            self._ended.set()

    async def _serve(self, server: Server, started: Future[bool]) -> bool:
        server.start()
        started.set_result(True)
        return await server.end("stop()", await asyncio.wrap_future(self._ending))

    # As a process of its own.

    def serve(self) -> int:
        """Serve until a signal, and take the process for it: signals, CPUs, garbage collector, its end. Returns the
        exit code. Raises SettingsError if it cannot listen."""
        process.raise_descriptor_limit()
        self.listen()
        config = self.settings
        process.pin(self.cpus())
        server = self._begin(None)
        if server is None:
            raise RuntimeError(ONCE)
        try:
            return process.serve(
                server,
                drain_timeout=config.drain_timeout,
                shutdown_delay=config.shutdown_delay,
                on_hangup=self.hang_up if self.configuration.can_reload else None,
                on_ready=self.succeed,
                successor=Successor(self.sockets_to_hand_over, self.memory) if self.is_command else None,
            )
        finally:
            self._state = State.STOPPED

    async def succeed(self) -> None:
        """The process before this one may end once this one knows its backends."""
        if self.predecessor is not None:
            while not self.control.is_serving():
                await asyncio.sleep(LOOK_SECONDS)
            self.predecessor.tell_serving()

    def sockets_to_hand_over(self) -> Handed:
        return self._listeners

    def cpus(self) -> list[int]:
        """Those to run on, [] for no choice. Raises SettingsError."""
        return process.cpus(self.settings.cpu_affinity)

    # What both do.

    def listen(self, handed: Handed | None = None) -> None:
        """Open the sockets that were not `handed` over, so that `url` is known; done by `start` and `serve` unless it
        was before."""
        with self._lock:
            if self._state not in (State.NEW, State.LISTENING):
                raise RuntimeError(ONCE)
            if self._state is State.NEW:
                self._listeners = self.bound(handed or {})
                self._server = self.server(self._listeners)
                self._state = State.LISTENING

    def bound(self, handed: Handed) -> dict[str, socket.socket]:
        """The sockets by their roles."""
        config = self.settings
        if set(handed) - set(handover.ROLES):
            raise SettingsError("workers = 1 after several of them: that takes a restart, SIGUSR2 cannot do it")
        with contextlib.ExitStack() as opened:
            listeners = {"http": handed.get("http") or opened.enter_context(self.listen_main())}
            for role, port in (("control", config.control_port), ("redirect", config.http_redirect_port)):
                if port is not None:
                    listeners[role] = handed.get(role) or opened.enter_context(
                        tcpsocket.listen(config.control_host, port)
                    )
                elif role in handed:
                    raise SettingsError(f"a Unix socket is handed over as {role}: set {handover.ROLES[role]} too")
            opened.pop_all()  # nothing has failed
        return listeners

    def server(self, listeners: Mapping[str, socket.socket]) -> Server:
        from balancer.edge.port import Port  # and with it Granian, which a master does without

        config = self.settings
        self.bridges = self.make_bridges()
        if config.http_redirect_port is not None:
            redirect = redirect_to(listeners["http"].getsockname()[1])
            self.bridges.append(Bridge(redirect, self.workers, _client_limits(config)))
        self.port_options = _port_options(config)
        wanted = self.wanted(len(listeners))
        ports = [Port(*each) for each in zip(self.bridges, listeners.values(), *zip(*wanted, strict=True), strict=True)]
        return Server(ports, on_start=self.start_parts, on_drain=self.drain, on_stop=self.stop_parts)

    def listen_main(self) -> socket.socket:
        config = self.settings
        if not config.host.startswith(UNIX):
            return tcpsocket.listen(config.host, config.port)
        path = config.host.removeprefix(UNIX)
        return unixsocket.listen(path, config.unix_socket_mode, config.unix_socket_owner, tcpsocket.BACKLOG)

    def _begin(self, thread: Thread | None) -> Server | None:
        """It is this thread's to run and to close; None if it is another's, or was stopped."""
        with self._lock:
            if self._state is not State.LISTENING:
                return None
            self._state, self._thread = State.RUNNING, thread
            return self._server

    def make_bridges(self) -> list[Bridge]:
        """The main one, and the control API's if it has a port of its own; both share the threads."""
        config = self.settings
        limits = _client_limits(config)
        app = self.proxy if self._app is None else self._app.wsgi_app
        is_wrapped = app is not self.proxy
        if hasattr(select, "epoll"):
            self.express = Express(self.workers, self.pools.soonest_late)
            self.sockets = None if is_wrapped else Sockets()
        bridges = [
            Bridge(
                app,
                self.workers,
                limits,
                is_control=self.proxy.is_control,
                # A WSGI middleware around the proxy must see every request, so there is no way past it then.
                proxy=None if is_wrapped else self.proxy,
                express=self.express,
                sockets=self.sockets,
            )
        ]
        self.pools.cut_off = lambda backend: bridges[0].leave_backend(lambda forwarding: forwarding.is_on(backend))
        self.pools.is_used = lambda pool: bridges[0].has(lambda forwarding: forwarding.is_for(pool))
        if config.control_port is not None:
            bridges.append(Bridge(self.control_app, self.workers, limits, is_control=lambda path: True))
        return bridges

    def start_parts(self) -> None:
        """All but the sockets, which another WSGI server has."""
        self.control.log.start()
        self.start_single_parts()
        self.pools.health.start()
        self.authentication.start()
        if self.express is not None:
            self.express.start()
        if self.sockets is not None:
            self.sockets.start()
        self.control.lifecycle = "running"

    def use_single_parts(self, config: Settings) -> None:
        """Those that there are once, however many worker processes there are. Raises SettingsError."""
        wiring.use_single(self.control, config)

    def start_single_parts(self) -> None:
        if self.memory is not None:
            if self.predecessor is not None:
                self.predecessor.ask_for_state()
            self.memory.start("decisions" if self.is_forgetful else None)
        if self.cluster is not None:
            self.cluster.start()
        self.control.discovery.start()
        self.control.history.start()
        self.renewal.start()
        self.scaling.start(adopts=self.predecessor is None)  # else that one has them still

    def wanted(self, ports: int) -> list[tuple[PortOptions, Certificate | None]]:
        """What the workers of each port are made of."""
        wanted = [(self.port_options, self.renewal.certificate)] * ports
        if ports and self.settings.http_redirect_port is not None:
            wanted[-1] = self.port_options, None
        return wanted

    def ports(self) -> Sequence[Port]:
        return [] if self._server is None else self._server.ports

    def renew(self) -> None:
        """Let the ports know, from any thread."""
        with self._lock:  # or the older of two could be the last
            ports = self.ports()
            for port, wanted in zip(ports, self.wanted(len(ports)), strict=True):
                port.renew(*wanted)

    def drain(self, text: str) -> None:
        self.control.lifecycle = "draining"
        self.control.events.add("draining", None, text)

    def stop_parts(self) -> None:
        self.control.lifecycle = "draining"
        if self.express is not None:
            self.express.stop()
        if self.sockets is not None:
            self.sockets.stop()
        self.copies.stop()
        self.pools.health.stop()
        self.authentication.stop()
        self.stop_single_parts()
        self.pools.close()
        self.control.log.stop()

    def stop_single_parts(self) -> None:
        self.scaling.stop()
        self.control.discovery.stop()
        self.renewal.stop()
        self.control.history.stop()
        if self.cluster is not None:
            self.cluster.stop()
        if self.memory is not None:
            self.memory.stop()

    def reload(self, dry_run: bool = False, accepts: Callable[[str], bool] = lambda hash: True) -> Plan:
        """Read the configuration again and apply what changed, if `accepts` takes the hash of the plan. Raises
        SettingsError or PlanChanged; then nothing has changed."""
        events = self.control.events
        try:
            check = partial(self._check, dry_run)
            plan = self.configuration.reload(self.control.pools, check, self.apply, dry_run=dry_run, accepts=accepts)
        except SettingsError as error:
            if not dry_run and self.configuration.read is not None:
                public = self.configuration.without_folders(str(error))
                events.add("config_refused", None, str(error), "error", ACTOR.get(), public=public)
                log.error("configuration not reloaded: %s", error)
            raise
        if not dry_run:
            text = "; ".join(str(change) for change in plan.changes) or "nothing has changed"
            if plan.needs_restart:
                text += f"; needs a restart: {', '.join(plan.needs_restart)}"
            events.add("config_reloaded", None, text, by=ACTOR.get())
            log.info("configuration reloaded: %s", text)
        return plan

    def hang_up(self) -> None:
        """SIGHUP."""
        with contextlib.suppress(SettingsError):  # `reload` has said why
            self.reload()

    def _check(self, dry_run: bool, config: Settings, plan: Plan) -> None:
        """Whether requests take the routes that are expected, and what files hold can be used, and is another
        certificate."""
        heads = wiring.request_heads(config, self.proxy.heads.pseudonym)
        check_expectations(config, heads, self.proxy.is_control)
        for name in self.authentication.check(config.auth, config.networks):
            plan.changes.append(Change(f"auth.{name}", name, name))
        before = self.renewal.certificate
        try:
            after = self.renewal.check(config.options(TlsOptions))
        except SettingsError as error:
            if not dry_run:
                self.renewal.refuse(error)
            raise
        if (before and before.digest) != (after and after.digest):
            plan.changes.append(Change("certificate", before and str(before), after and str(after)))

    def apply(self, config: Settings, plan: Plan) -> None:
        """From here on new requests see the new settings.

        Those under way keep their Route and RequestHead; all else they look up at each step anew.
        """
        self.pools.use(config, plan.pools)
        self.use_single_parts(config)
        self.authentication.use()
        self.proxy.routes = self.routes(config)
        self.pools.retire()
        self.proxy.heads = wiring.request_heads(config, self.proxy.heads.pseudonym, self.authentication.ours)
        for bridge in self.bridges:
            bridge.limits = _client_limits(config)
        self.port_options = _port_options(config)
        self.renewal.use()
        self.renew()
        logging.getLogger().setLevel(config.log_level.upper())


def create_app(
    config: Settings | None = None, sources: Mapping[str, str] | None = None, filters: Iterable[Filter] | None = None
) -> Flask:
    """A Flask app whose `wsgi_app` forwards everything but the control paths.

    Its LoadBalancer is `app.extensions["balancer"]`; nothing runs until that starts. Raises SettingsError.
    """
    return LoadBalancer(config=config or Settings(), sources=sources, filters=filters).app


def started_app() -> Flask:
    """The app as the environment says, for other WSGI servers; it stops when the process ends. Raises SettingsError."""
    config, sources = settings.load({})
    balancer = LoadBalancer(config=config, sources=sources)
    for warning in [*settings.warnings(), *balancer.advice()]:
        log.warning(warning)
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
    from balancer.edge.port import Port

    config = Settings()  # by default
    workers = WorkerPool(threads, threads, config.thread_idle_timeout)
    bridge = Bridge(app, workers, config.options(ClientLimits))
    served = Port(bridge, tcpsocket.listen(host, port), config.options(PortOptions))
    on_listen(served.url)
    return process.serve(
        Server([served], on_drain=lambda text: on_drain()),
        drain_timeout=config.drain_timeout,
        shutdown_delay=config.shutdown_delay,
    )


def _listed(backends: Any) -> Any:
    """One alone is a list of one. The settings check what is in it, and split a string at its commas."""
    if backends is None:
        return []
    is_one = isinstance(backends, Mapping | BackendSettings) or not isinstance(backends, Iterable)
    return [backends] if is_one else backends if isinstance(backends, str) else list(backends)


def _checked(filters: Any) -> list[Filter]:
    given = [] if filters is None else list(filters) if isinstance(filters, Iterable) else [filters]
    if isinstance(filters, Filter) or not all(isinstance(each, Filter) for each in given):
        raise SettingsError(f"filters = {validation.shown(filters)}: expected a list of Filter objects")
    return given


def _room() -> int:
    """Requests in flight that the limit of open files allows."""
    return max(1, process.descriptor_limit() // 2 - SPARE_DESCRIPTORS)


def _client_limits(config: Settings) -> ClientLimits:
    """With `max_websockets`, or what leaves other requests half the room."""
    return replace(config.options(ClientLimits), max_websockets=min(config.max_websockets, _room() // 2))


def _port_options(config: Settings) -> PortOptions:
    """With `max_clients`, or what the limit of open files allows: a request in flight needs two."""
    room = _room()
    if room < config.max_clients // 2:
        log.warning("the limit of open files allows %d clients, not max_clients = %d", room, config.max_clients)
    return replace(config.options(PortOptions), max_clients=min(config.max_clients, room))

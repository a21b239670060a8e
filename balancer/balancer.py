"""The balancer as a whole: it listens, starts, reads its settings again, drains and stops."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from balancer.balancing.options import PoolOptions
from balancer.config.reload import Configuration, Plan
from balancer.config.settings import Settings
from balancer.control.access import AccessOptions
from balancer.control.control import Control
from balancer.edge import server
from balancer.edge.bridge import Bridge
from balancer.edge.express import Express
from balancer.edge.listener import ClientLimits
from balancer.edge.workers import WorkerPool
from balancer.edge.wsgi import ReverseProxy
from balancer.errors import SettingsError
from balancer.fleet.health import HealthChecker, HealthOptions
from balancer.forwarding.route import RouteOptions
from balancer.observe.accesslog import LogOptions
from balancer.protocol.requestheads import RequestHeads
from balancer.upstream.transport import BackendAdapter, Timeouts

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = logging.getLogger("balancer")


@dataclass(slots=True)
class Balancer:
    """The parts that `wiring.create_app` made, for whoever serves the app. `start` and `stop` once each."""

    configuration: Configuration
    control: Control
    proxy: ReverseProxy
    control_app: WSGIApplication
    health: HealthChecker
    adapter: BackendAdapter
    bridges: list[Bridge] = field(default_factory=list)
    express: Express | None = None

    @property
    def settings(self) -> Settings:
        return self.configuration.settings

    def listen(self, app: WSGIApplication) -> list[tuple[Bridge, socket.socket]]:
        """The main bridge and its socket, then the control API's if it has a port of its own; both share the threads.

        `app` is what shall be served: the Flask app's `wsgi_app`. Raises SettingsError if it cannot listen.
        """
        config = self.settings
        workers = WorkerPool(config.max_threads, config.max_queued, config.thread_idle_timeout)
        self.control.queued = lambda: workers.queued
        if hasattr(select, "epoll"):
            self.express = Express(self.adapter, workers)
        bridge = Bridge(
            app,
            workers,
            config.options(ClientLimits),
            is_control=self.proxy.is_control,
            # A WSGI middleware around the proxy must see every request, so there is no way past it then.
            proxy=self.proxy if app is self.proxy else None,
            express=self.express,
        )
        listeners = [(bridge, server.listen(config.host, config.port))]
        if config.control_port is not None:
            limits = config.options(ClientLimits)
            control = Bridge(self.control_app, workers, limits, is_control=lambda path: True)
            listeners.append((control, server.listen(config.host, config.control_port)))
        self.bridges = [bridge for bridge, _ in listeners]
        return listeners

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

        Those under way keep their Route and RequestHeads; all else they look up at each step anew.
        """
        plan.pool.options = config.options(PoolOptions)
        self.control.pool.apply(plan.pool)
        self.adapter.timeouts = config.options(Timeouts)
        self.health.use(config.options(HealthOptions))
        self.proxy.route = replace(self.proxy.route, options=config.options(RouteOptions))
        self.proxy.route.access_log.options = config.options(LogOptions)
        self.proxy.heads = RequestHeads(self.proxy.heads.pseudonym, config.networks, config.max_header_count)
        self.control.access.options = config.options(AccessOptions)
        for bridge in self.bridges:
            bridge.limits = config.options(ClientLimits)
        logging.getLogger().setLevel(config.log_level.upper())

"""One worker process: the data path alone. Whatever is there once it has from its master, or asks it for."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from balancer import wiring
from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.changes import Change
from balancer.balancing.ejection import KeptEjection
from balancer.balancing.pool import BackendPool
from balancer.balancing.shared import SharedLoads
from balancer.config.comparison import Plan
from balancer.config.settings import Settings
from balancer.edge import process
from balancer.edge.server import Server
from balancer.edge.tls import Certificate, TlsOptions
from balancer.errors import SettingsError
from balancer.filters.sharedlimit import SETTLE_SECONDS
from balancer.fleet.health import Checked, HealthChecker
from balancer.forwarding.filter import Filter
from balancer.loadbalancer import LoadBalancer
from balancer.observe import logrecords
from balancer.observe.events import EventKind, Events
from balancer.observe.reports import Ledger, Reports
from balancer.processes.forwarded import AskingMaster
from balancer.processes.link import Link
from balancer.processes.news import Numbers, PoolNews, Start, changes
from balancer.protocol.origin import Origin

log = logging.getLogger("balancer.processes")

BEAT_SECONDS = 0.5
MOST_DESCRIPTORS = 16
MASTER = "master"  # the ACTOR of what is done because it said so
# What traffic makes of a backend, and so has to be told. The master sees all else by itself.
JUDGED = frozenset({"backend_down", "backend_ejected", "backend_returned", "backend_slow"})
OF_TRAFFIC = frozenset({"limit_reached", "limit_keys_full"})  # events that have no other source


class Untold(HealthChecker):
    """The master checks. Here time passes alone."""

    ask_master: Callable[[], None]

    def use(self, checked: Sequence[Checked]) -> None:
        """None of them."""

    def wake(self) -> None:
        self.ask_master()


class ToldEvents(Events):
    """Those of traffic are the master's to keep."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def add(self, kind: EventKind, backend: str | None, message: str, *more: Any, **named: Any) -> None:
        if kind in OF_TRAFFIC:
            self._link.tell("event", kind, backend, message, more, named)


class Worker(LoadBalancer):
    """What begins with `take_` is called in the thread of the link. `_orders` is done when it has to end, with why, how
    many seconds what is in flight has, after how many more, and whether others accept already; `_hurry` when it has to
    end at once."""

    def __init__(self, link: Link, start: Start, descriptors: Sequence[int]) -> None:
        self._link = link
        self._start = start
        self._loads_fd, ledger, *listening = descriptors
        self._sockets = {role: socket.socket(fileno=each) for role, each in zip(start.roles, listening, strict=True)}
        self._ask = AskingMaster(link)
        self.reports = Reports(Ledger(ledger))
        self._hurry: Future[None] = Future()
        self._orders: Future[tuple[str, float, float, bool]] = Future()
        super().__init__(config=start.settings, sources=start.sources)
        self.proxy.heads = wiring.request_heads(self.settings, start.pseudonym, self.authentication.ours)
        self.pools.tell = self._tell
        self.pools.look = self._tell_numbers
        self._counted: dict[str, Mapping[str, int]] = {}  # what was told of, by what it is
        self.control.canaries.take(start.canaries)
        for name, news in start.pools.items():
            self.take_pool(name, news)
            pool = self.control.pools.get(name)
            if pool is not None:
                pool.adopt(news.health)
                pool.eject(news.ejections)

    def make(self, config: Settings, sources: Mapping[str, str] | None, filters: Sequence[Filter]) -> wiring.Parts:
        parts = wiring.make(
            *(config, sources, filters, self.reload, self.renew, self.ports),
            wiring.Own(
                *(self.reports, self.reports.routes, ToldEvents(self._link), Untold),
                loads=SharedLoads(self._loads_fd, self._start.number),
                certificate=self._start.certificate,
                salt=self._start.salt,
                control_app=self._ask,
                control_paths=self._start.control_paths,
            ),
        )
        assert isinstance(parts.pools.health, Untold)
        parts.pools.health.ask_master = lambda: self._link.tell("wake")
        return parts

    def use_single_parts(self, config: Settings) -> None:
        """The master has them."""

    def start_single_parts(self) -> None:
        """As well."""

    def stop_single_parts(self) -> None:
        """The master hears now what has happened to the last."""
        self._tell_numbers()

    # What it serves.

    def serve(self) -> int:
        process.pin(list(self._start.cpus))
        for each in self._sockets.values():
            each.setblocking(False)
        self.listen(self._sockets)
        server = self._begin(None)
        assert server is not None
        has_ended = server.run(self._serve_on(server))
        self._link.finish()
        if not has_ended:
            logging.shutdown()
            os._exit(0)  # as `process.serve`
        return 0

    async def _serve_on(self, server: Server) -> bool:
        server.start()
        self._link.start(
            {
                "settings": self.take_settings,
                "pool": self.take_pool,
                "check": self.take_check,
                "refused": self.take_refused,
                "ejection": self.take_ejection,
                "cut": self.take_cut,
                "alive": self.take_alive,
                "canaries": self.control.canaries.take,
                "elsewhere": self.control.pools.note_elsewhere,
                "sharing": self.control.limiter.share,
                "settled": self.control.limiter.settle,
                "answer": self._ask.answered,
                "end": self._end,
                "leave": lambda: self._end("others take over", self.settings.drain_timeout, 0.0, True),
                "hurry": lambda: self._hurry.set_result(None),
            },
            self._left_alone,
        )
        process.settle_memory()
        self._link.tell("ready")
        repeated = [asyncio.create_task(each) for each in (self._beat(), self._charge())]
        why, limit, delay, gives_way = await asyncio.wrap_future(self._orders)
        hurry = asyncio.wrap_future(self._hurry)
        if gives_way:
            await server.give_way(hurry)
        ended = await server.end(why, limit, delay, hurry)
        for each in repeated:
            each.cancel()
        return ended

    async def _beat(self) -> None:
        """Whoever hears nothing takes this process for hung."""
        while True:
            self._link.tell("beat")
            await asyncio.sleep(BEAT_SECONDS)

    async def _charge(self) -> None:
        """What limits have let through is said to the ledger that all workers have."""
        while True:
            if charges := self.control.limiter.charges():
                self._link.tell("charges", charges)
            await asyncio.sleep(SETTLE_SECONDS if self.settings.limits else BEAT_SECONDS)

    def _end(self, why: str, limit: float, delay: float, gives_way: bool = False) -> None:
        if not self._orders.done():
            self._orders.set_result((why, limit, delay, gives_way))

    def _left_alone(self) -> None:
        self._ask.give_up()
        self._end("the master is gone", self.settings.drain_timeout, 0.0)

    # What it is told, in the thread of the link.

    def take_settings(
        self,
        config: Settings,
        sources: Mapping[str, str],
        certificate: Certificate | None,
        pools: Mapping[str, PoolNews],
    ) -> None:
        try:
            before, plan = self.settings, Plan()
            old = before.by_pool()
            for name, each in config.by_pool().items():
                pool = self.control.pools.get(name)
                plan.pools[name] = changes(pool, pools[name], each, old.get(name, each))
            if config != before:
                self.authentication.check(config.auth, config.networks)
            self.renewal.take(config.options(TlsOptions), certificate)
            self.apply(config, plan)
            self.configuration.settings, self.configuration.sources = config, sources
        except Exception:  # the master has them in force
            log.exception("the settings cannot be used here; another worker is to begin with them")
            self._end("another worker is to begin", self.settings.drain_timeout, 0.0)

    def take_pool(self, name: str, news: PoolNews) -> None:
        """One that is leaving lets its backends go by itself."""
        pool, config = self.control.pools.get(name), self.settings.by_pool().get(name)
        if pool is not None and config is not None:
            pool.apply(changes(pool, news, config, config))
            pool.let_grow(news.may_grow)
            for backend in pool.backends():  # maintenance ends an ejection, and may be over before we hear of it
                if backend.id not in news.ejections:
                    pool.record_verdict(backend, None)

    def take_check(self, pool: str, backend: str, origin: Origin, check: LastCheck) -> None:
        for found, member in self._found(pool, backend):
            found.record_check(member, check, origin)

    def take_refused(self, pool: str, backend: str, origin: Origin, reason: str) -> None:
        for found, member in self._found(pool, backend):
            found.record_refused(member, reason, origin)

    def take_ejection(self, pool: str, backend: str, kept: KeptEjection | None) -> None:
        for found, member in self._found(pool, backend):
            if kept is None:
                found.record_verdict(member, None)
            else:
                found.eject({backend: kept})

    def take_alive(self, alive: Mapping[str, Mapping[str, float]]) -> None:
        for pool in self.control.pools:
            pool.note_alive(alive.get(pool.name, {}))

    def take_cut(self, backend_id: str) -> None:
        """Who was removed at once, and leaves as we were told before."""
        for pool in self.control.pools:
            backend = pool.get(backend_id)
            if backend is not None and backend.is_leaving:
                pool.remove(backend_id, at_once=True)

    def _found(self, name: str, backend_id: str) -> Iterator[tuple[BackendPool, Backend]]:
        """Also in a pool of that name that is leaving."""
        for pool in self.control.pools:
            backend = pool.get(backend_id)
            if pool.name == name and backend is not None:
                yield pool, backend

    # What it tells.

    def _tell(self, pool: BackendPool, change: Change) -> None:
        backend = pool.get(change.backend)
        if change.by != MASTER and change.kind in JUDGED and backend is not None:
            reason = backend.ejection.reason if change.kind == "backend_ejected" else change.text
            self._link.tell("judged", pool.name, backend.id, backend.origin, change.kind, reason)

    def _tell_numbers(self) -> None:
        """In the thread of `health`, about once a second."""
        self.reports.flush()
        selected = {
            pool.name: self._added(pool.name, {each.id: each.counts.selected for each in pool.backends()})
            for pool in self.control.pools
        }
        alive = {pool.name: found for pool in self.control.pools if (found := pool.alive())}
        limits = self._added("", self.control.limiter.counts())
        late = {pool.name: pool.hedging.late() for pool in self.control.pools}
        told = Numbers(self.workers.queued, self.pools.idle(), selected, alive, limits, self.control.log.dropped, late)
        self._link.tell("numbers", told)

    def _added(self, kind: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Since it was asked last."""
        before, self._counted[kind] = self._counted.get(kind, {}), counts
        return {name: more for name, count in counts.items() if (more := count - before.get(name, 0)) > 0}


def run(ours: socket.socket) -> int:
    """As the worker that the other end of this wants: at once, or when one is needed."""
    try:
        told, descriptors, *_ = socket.recv_fds(ours, 1, MOST_DESCRIPTORS)
        if not told:
            return 1  # the master is gone already
        link = Link(ours, "master", MASTER)
        worker = Worker(link, link.first(), descriptors)
    except SettingsError as error:
        print(f"worker: {error}", file=sys.stderr)
        return 2
    except (EOFError, OSError):  # as well
        return 1
    logrecords.install(worker.control.log, worker.settings.log_level, lambda: worker.settings.access_log_format)
    return worker.serve()

"""Several worker processes, and what there is once for all of them, in the process that starts them.

It has the sockets, the control API, health checks, decisions, the configuration, and what is kept. It never imports
Granian, whose threads would be in the way of starting processes and could take all of this with them.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from balancer import wiring
from balancer.balancing.backends import Backend, LastCheck
from balancer.balancing.changes import Change as PoolChange
from balancer.balancing.pool import BackendPool
from balancer.balancing.shared import SharedLoads
from balancer.config.comparison import Plan
from balancer.config.settings import Settings
from balancer.control.api import READS
from balancer.control.control import WorkerView
from balancer.control.openapi import PATHS
from balancer.edge import process, quota, tcpsocket
from balancer.edge.handover import ROLES, Handed
from balancer.edge.server import Server
from balancer.filters.sharedlimit import Accounts, Asked, Charge, Settle
from balancer.forwarding.filter import Filter
from balancer.loadbalancer import LoadBalancer
from balancer.observe.events import EventKind
from balancer.observe.reports import Collector, Ledger
from balancer.processes import reuseport
from balancer.processes.crew import Crew, Meeting, Place
from balancer.processes.forwarded import AnsweringWorkers
from balancer.processes.link import Link
from balancer.processes.news import Numbers, Start, news_of
from balancer.protocol.addresses import UNIX
from balancer.protocol.origin import Origin

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

HEARD_SECONDS = 1.0  # that an answer waits for workers which have not heard yet what it has changed
# After them workers have to know of the pool anew; what traffic or checks change is told by itself.
OF_MEMBERS = frozenset({"backend_added", "backend_removed", "backend_changed", "backend_draining", "algorithm_changed"})


class Master(LoadBalancer):
    """`_telling` guards `_links`, who hears what, and the order in which all hear it. It is taken after all other
    locks but those of pools. `_settling` guards `_accounts`, of the limits that workers hold together; with a cluster
    that has them, what they ask waits in `_asked`."""

    def __init__(self, config: Settings, sources: Mapping[str, str] | None = None) -> None:
        self.count = quota.workers(config.workers)
        self._telling = Lock()
        self._links: list[Link] = []
        self._crew: Crew | None = None
        self._mains: list[socket.socket] = []
        self._names: dict[str, Any] = {}  # of listening sockets by role, which may be closed by now
        self._config = config  # that workers have
        self._loads = SharedLoads()
        self._ledgers: dict[int, Ledger] = {}  # by the number of the worker
        self._numbers: dict[int, Numbers] = {}  # as well
        self._growing: dict[str, bool] = {}  # pools, as workers know of it
        self._settling = Lock()
        self._accounts = Accounts()
        self._asked: deque[Asked] = deque()
        self._sharing = (self.count, False)
        super().__init__(config=config, sources=sources)
        self._answering = AnsweringWorkers(self._answer)
        self._follow = self.pools.tell
        self.pools.tell = self._changed
        self.pools.cut_off = self._cut_off
        self.pools.health.on_check = self._checked
        self.control.workers = self._describe
        if self.cluster is not None:
            self.cluster.asks, self.cluster.share = self._asks, self._share
            self.cluster.note_elsewhere = partial(self._tell, "elsewhere")
        self.control.queued = lambda: sum(each.queued for each in list(self._numbers.values()))
        self.control.idle = self._idle
        self.control.log.dropped_elsewhere = lambda: sum(each.dropped for each in list(self._numbers.values()))
        self._collector = Collector(self.control.statistics, self.control.routes, self.control.canaries)
        self._look, self.pools.look = self.pools.look, self._look_around

    def make(self, config: Settings, sources: Mapping[str, str] | None, filters: Sequence[Filter]) -> wiring.Parts:
        own = wiring.Own(loads=self._loads, take=lambda: self._collector.take())
        return wiring.make(config, sources, filters, self.reload, self.renew, self.ports, own)

    # What it is as a whole.

    @property
    def urls(self) -> list[str]:
        found = []
        for role, name in self._names.items():
            scheme = "http" if self.renewal.certificate is None or role == "redirect" else "https"
            found.append(tcpsocket.url_of(name if isinstance(name, str) else name[:2], scheme))
        return found

    def told(self) -> list[str]:
        return [f"{self.count} workers"]

    def cpus(self) -> list[int]:
        """Its workers are pinned."""
        return []

    def serve(self) -> int:
        code = super().serve()
        assert self._crew is not None
        return 1 if self._crew.failure else code

    def listen_main(self) -> socket.socket:
        config = self.settings
        if config.host.startswith(UNIX):
            return super().listen_main()
        self._mains = reuseport.listen(config.host, config.port, self.count)
        return self._mains[0]

    def bound(self, handed: Handed) -> dict[str, socket.socket]:
        self._mains = [each for role, each in handed.items() if role.startswith("http")]
        return super().bound({role: each for role, each in handed.items() if role in ROLES})

    def sockets_to_hand_over(self) -> Handed:
        assert self._crew is not None
        mains = dict.fromkeys(self._crew.sockets())  # the same one may be everybody's
        named = {f"http{number or ''}": each for number, each in enumerate(mains)}
        return {**named, **{role: each for role, each in self._listeners.items() if role != "http"}}

    async def succeed(self) -> None:
        """The process before this one may have had more workers, or fewer."""
        if self.predecessor is not None and self._crew is not None:
            self._crew.adapt(self.count)
        await super().succeed()

    def server(self, listeners: Mapping[str, socket.socket]) -> Server:
        mains = self._mains if len(self._mains) > 1 else [listeners["http"]] * self.count
        mains += [reuseport.listen_too(*mains[0].getsockname()[:2]) for _ in range(self.count - len(mains))]
        self._mains = mains
        self._names = {role: each.getsockname() for role, each in listeners.items()}
        others = [each for role, each in listeners.items() if role != "http"]
        self._crew = Crew(
            *(mains, others, Meeting(self._passes, self._welcome, self._lost, self._cpus_of)),
            on_start=self.start_parts,
            on_drain=self.drain,
            on_stop=self.stop_parts,
        )
        return self._crew

    def stop_single_parts(self) -> None:
        self._answering.stop()
        super().stop_single_parts()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """A control request. What has happened before it is counted, and what it changes holds in every worker when
        it is answered."""
        self._collector.take()
        answer = self.control_app(environ, start_response)
        if environ["REQUEST_METHOD"] not in READS:
            with self._telling:
                echoes = [link.echo() for link in self._links]
            end = time.monotonic() + HEARD_SECONDS
            for echo in echoes:
                echo.wait(max(0.0, end - time.monotonic()))
        return answer

    def _look_around(self) -> None:
        self._look()
        if told := self.control.canaries.shares():
            self._tell("canaries", told)
        for pool in self.control.pools:
            if pool.may_grow != self._growing.get(pool.name, False):
                self._tell_of(pool)

    def _idle(self) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {}
        for numbers in list(self._numbers.values()):
            for pool, idle in numbers.idle.items():
                found.setdefault(pool, Counter()).update(idle)
        return found

    def _cpus_of(self, number: int) -> Sequence[int]:
        wanted = self.settings.cpu_affinity
        if wanted == "auto" and hasattr(os, "sched_getaffinity"):
            available = sorted(os.sched_getaffinity(0), reverse=True)
        else:
            available = process.cpus(wanted)
        return available and [available[number % len(available)]]

    def _describe(self) -> list[WorkerView]:
        return [] if self._crew is None else [place.describe() for place in self._crew.places]

    # Its workers come and go.

    def _passes(self, place: Place) -> list[int]:
        ledger = self._ledgers[place.number] = Ledger()
        self._loads.forget(place.number)
        self._collector.add(ledger)
        return [self._loads.fd, ledger.fd, *(each.fileno() for each in self._sockets(place).values())]

    def _sockets(self, place: Place) -> dict[str, socket.socket]:
        return {**self._listeners, "http": place.listener}

    def _welcome(self, place: Place) -> None:
        assert place.child is not None
        child, link = place.child, place.child.link
        with self._telling:
            start = Start(
                number=place.number,
                settings=_of_worker(self._config),
                sources=self.configuration.sources,
                certificate=self.renewal.certificate,
                pools={pool.name: news_of(pool) for pool in self.control.pools},
                canaries=self.control.canaries.shares(),
                pseudonym=self.proxy.heads.pseudonym,
                salt=self.control.limiter.salt,
                control_paths=tuple(PATHS),
                roles=tuple(self._sockets(place)),
                cpus=place.cpus,
            )
            link.tell("start", start)
            link.tell("sharing", *self._sharing)
            self._links.append(link)
        self._share_alone()

        def ask(number: int, told: dict[str, Any], body: bytes | Exception) -> None:
            self._answering.ask(told, body, lambda answer: link.tell("answer", number, answer))

        link.start(
            {
                "ready": child.ready,
                "beat": child.beat,
                "ask": ask,
                "judged": self._take_verdict,
                "wake": self.pools.health.wake,
                "event": self._take_event,
                "numbers": partial(self._take_numbers, place.number),
                "charges": partial(self._take_charges, place.number, partial(link.tell, "settled")),
            },
            lambda: None,
        )

    def _lost(self, place: Place, text: str) -> None:
        """It may have begun, or not."""
        ledger = self._ledgers.pop(place.number)
        in_flight = self._collector.end(ledger)
        ledger.close()
        self._loads.forget(place.number)
        self._numbers.pop(place.number, None)
        with self._telling:
            living = [] if self._crew is None else [each.child.link for each in self._crew.places if each.child]
            self._links = [link for link in self._links if link in living]
        self._share_alone()
        if text:
            wiring.noting(self.control.events)("worker_lost", f"{text}, with {in_flight} requests in flight")

    # The limits that workers hold together, and with those of other members if there is a cluster.

    def _take_charges(self, worker: int, settle: Settle, charges: Sequence[Charge]) -> None:
        if self.cluster is not None:
            self._asked.append((f"/{worker}", charges, settle))
            return
        with self._settling:
            settled = self._accounts.charge(worker, charges, self.control.limiter.clock())
        settle(charges, settled)

    def _asks(self) -> Iterator[Asked]:
        while self._asked:
            yield self._asked.popleft()

    def _share(self, members: int, is_lost: bool) -> None:
        if is_lost:
            self._asked.clear()
        self._sharing = members, is_lost
        self._tell("sharing", members, is_lost)

    def _share_alone(self) -> None:
        """After a worker has come or gone."""
        if self.cluster is None and self._crew is not None:
            self._share(max(1, len(self._crew.places)), False)

    # What workers say, each in the thread of its link.

    def _take_verdict(self, name: str, backend_id: str, origin: Origin, kind: str, reason: str) -> None:
        for pool in self.control.pools:
            backend = pool.get(backend_id)
            if pool.name != name or backend is None:
                continue
            if kind == "backend_slow":
                self._follow(pool, PoolChange("backend_slow", backend_id, reason, "warning"))
            elif kind == "backend_down":
                pool.record_refused(backend, reason, origin)
                self._tell("refused", name, backend_id, origin, reason)
            else:
                pool.record_verdict(backend, reason if kind == "backend_ejected" else None, origin)
                self._tell("ejection", name, backend_id, pool.ejections().get(backend_id))

    def _take_event(self, kind: EventKind, backend: str | None, message: str, more: Any, named: Any) -> None:
        self.control.events.add(kind, backend, message, *more, **named)

    def _take_numbers(self, worker: int, numbers: Numbers) -> None:
        self._numbers[worker] = numbers
        self.control.limiter.restore([*numbers.limits.items()])
        for pool in self.control.pools:
            pool.note_selected(numbers.selected.get(pool.name, {}))
            pool.note_alive(numbers.alive.get(pool.name, {}))
            pool.hedging.note_late(numbers.late.get(pool.name))
        if numbers.alive:
            self._tell("alive", numbers.alive)

    # What they are told.

    def _tell(self, what: str, *values: Any) -> None:
        with self._telling:
            for link in self._links:
                link.tell(what, *values)

    def _changed(self, pool: BackendPool, change: PoolChange) -> None:
        if change.kind in OF_MEMBERS:
            self._tell_of(pool)  # first: what is checked because of it says something of who it is now
        self._follow(pool, change)

    def _tell_of(self, pool: BackendPool) -> None:
        with self._telling:  # so that the newest comes last
            news = news_of(pool)
            self._growing[pool.name] = news.may_grow
            for link in self._links:
                link.tell("pool", pool.name, news)

    def _checked(self, pool: BackendPool, backend: Backend, check: LastCheck, origin: Origin) -> None:
        self._tell("check", pool.name, backend.id, origin, check)

    def _cut_off(self, backend: Backend) -> None:
        self._tell("cut", backend.id)

    def apply(self, config: Settings, plan: Plan) -> None:
        self._config = config
        super().apply(config, plan)  # which renews

    def renew(self) -> None:
        with self._telling:
            pools = {pool.name: news_of(pool) for pool in self.control.pools}
            for link in self._links:
                link.tell(
                    "settings",
                    *(_of_worker(self._config), self.configuration.sources),
                    *(self.renewal.certificate, pools),
                )


def _of_worker(config: Settings) -> Settings:
    """Nothing that there is once. What is told for information, the master tells."""
    level = "warning" if config.log_level == "info" else config.log_level
    return config.model_copy(update={"state_file": None, "log_level": level})

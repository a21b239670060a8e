"""Backends that DNS names: each address is one.

A name is asked for again when what was said of it is too old by its own word, within limits. A name server that is
silent holds up the thread of this source alone, and that for no longer than LOOK_SECONDS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import dns.asyncresolver
import dns.exception
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver

from balancer.balancing.backends import MAX_WEIGHT
from balancer.config.values import BackendSettings, name_server
from balancer.fleet.discovery import Found, Source, SourceFailed, id_of
from balancer.protocol.origin import Discovered

LOOK_SECONDS = 4.0  # for all that is asked in one look
ANSWER_SECONDS, SERVER_SECONDS = 2.0, 0.7  # for one question; for one server until the next one is asked
SHORTEST_SECONDS, LONGEST_SECONDS = 1.0, 60.0  # that an answer is used before there is another look
LOST_SECONDS = 1.0  # between two looks at who is lost
UDP_BYTES = 1232  # of an answer, which fit into one packet everywhere; larger ones come over TCP
MOST = 256  # addresses, and SRV records
FAILURES = {
    dns.resolver.NXDOMAIN: "there is no such name",
    dns.resolver.NoAnswer: "it has no such records",
    dns.resolver.LifetimeTimeout: "no name server answered in time",
    dns.resolver.NoNameservers: "no name server could answer",
    dns.resolver.NoResolverConfiguration: "the system names no name server, set dns_servers",
}


class Place(NamedTuple):
    """Where a backend is. `priority` is that of its SRV record, the lowest the best."""

    priority: int
    address: str
    port: int
    weight: int


class DnsSource(Source):
    """The addresses of a name, or of the targets of its SRV records (RFC 2782). `is_lost` says of the id of a backend
    that it takes no requests: a lower priority gets none before all of the better ones are lost.

    `_loop` and `_asking` are set by the thread that looks, so that another can end what that waits for.
    """

    def __init__(
        self,
        pool: str,
        entry: BackendSettings,
        where: Discovered,
        servers: Sequence[str],
        is_lost: Callable[[str], bool],
    ) -> None:
        self.kind = where.kind
        super().__init__(f"{where.kind}:{entry.id}", where.url, (pool, entry, servers), pool)
        self._pool, self._entry, self._where = pool, entry, where
        self._servers = [name_server(server) for server in servers]
        self._is_lost = is_lost
        self._known: dict[dns.name.Name, tuple[list[str], int]] = {}  # of each target, for when it cannot be asked for
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asking: asyncio.Task[Any] | None = None

    def look(self) -> Generator[Sequence[Found], None, None]:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            self._loop = runner.get_loop()
            while not self.stopping.is_set():
                places, seconds = runner.run(self._ask())
                left = min(max(SHORTEST_SECONDS, seconds), LONGEST_SECONDS)
                while left > 0 and not self.stopping.is_set():
                    yield self._found(places)
                    pause = min(left, LOST_SECONDS if self.kind == "srv" else left)
                    left -= pause
                    self.stopping.wait(pause)

    def stop(self) -> None:
        super().stop()
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed by now
                self._loop.call_soon_threadsafe(lambda: self._asking and self._asking.cancel())

    async def _ask(self) -> tuple[list[Place], float]:
        """Who is there, and for how many seconds that holds. Raises SourceFailed."""
        self._asking = asyncio.current_task()
        try:
            if self.stopping.is_set():
                raise asyncio.CancelledError
            async with asyncio.timeout(LOOK_SECONDS):
                resolver = self._resolver()
                return await (self._services(resolver) if self.kind == "srv" else self._hosts(resolver))
        except asyncio.CancelledError:
            raise SourceFailed("it was stopped") from None
        except TimeoutError:
            raise SourceFailed(f"{self._where.name}: {FAILURES[dns.resolver.LifetimeTimeout]}") from None
        except dns.exception.DNSException as error:
            raise SourceFailed(f"{self._where.name}: {FAILURES.get(type(error), str(error))}") from None

    def _resolver(self) -> dns.asyncresolver.Resolver:
        resolver = dns.asyncresolver.Resolver(configure=not self._servers)
        if self._servers:
            resolver.nameservers = [dns.nameserver.Do53Nameserver(*server) for server in self._servers]
        resolver.lifetime, resolver.timeout = ANSWER_SECONDS, SERVER_SECONDS
        resolver.use_search_by_default = True
        resolver.use_edns(0, 0, UDP_BYTES)
        return resolver

    async def _hosts(self, resolver: dns.asyncresolver.Resolver) -> tuple[list[Place], float]:
        port = int(self._where.port or (443 if self._where.scheme == "https" else 80))
        addresses, seconds = await _addresses(resolver, self._where.name)
        return [Place(0, address, port, self._entry.weight) for address in addresses], seconds

    async def _services(self, resolver: dns.asyncresolver.Resolver) -> tuple[list[Place], float]:
        answer = await resolver.resolve(self._where.name, dns.rdatatype.SRV)
        records = sorted(answer, key=lambda record: (record.priority, record.target, record.port))[:MOST]
        targets = {record.target for record in records} - {dns.name.root}  # a service that is not there (RFC 2782)
        await asyncio.gather(*(self._find(resolver, target) for target in targets))
        self._known = {target: known for target, known in self._known.items() if target in targets}
        largest = max((record.weight for record in records), default=0)
        places: dict[tuple[str, int], Place] = {}
        seconds: float = answer.chaining_result.minimum_ttl
        for record in records:
            addresses, fresh = self._known.get(record.target, ([], LONGEST_SECONDS))
            seconds = min(seconds, fresh)
            weight = record.weight if largest <= MAX_WEIGHT else round(record.weight * MAX_WEIGHT / largest)
            for address in addresses:
                place = Place(record.priority, address, record.port, max(1, weight))
                places.setdefault((address, record.port), place)
        return list(places.values())[:MOST], seconds

    async def _find(self, resolver: dns.asyncresolver.Resolver, target: dns.name.Name) -> None:
        """What is known of one that cannot be asked for stays."""
        try:
            self._known[target] = await _addresses(resolver, target)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            self._known.pop(target, None)
        except dns.exception.DNSException:
            if target not in self._known:
                raise

    def _found(self, places: Sequence[Place]) -> list[Found]:
        used = self._used(places)
        return [
            Found(
                self._id(place),
                self._pool,
                self._where.origin(place.address, place.port),
                place.weight if place.priority in used else 0,
                self._entry.max_connections,
                self._entry.drain_timeout,
            )
            for place in places
        ]

    def _used(self, places: Iterable[Place]) -> set[int]:
        """Priorities whose backends get requests."""
        used = set()
        for priority in sorted({place.priority for place in places}):
            used.add(priority)
            if not all(self._is_lost(self._id(place)) for place in places if place.priority == priority):
                break
        return used

    def _id(self, place: Place) -> str:
        return id_of(self._entry.id, place.address, place.port if self.kind == "srv" else None)


async def _addresses(resolver: dns.asyncresolver.Resolver, name: str | dns.name.Name) -> tuple[list[str], int]:
    """Those of IPv4; those of IPv6 only if there are none, for each server is to be one backend."""
    try:
        answer = await resolver.resolve(name, dns.rdatatype.A)
    except dns.resolver.NoAnswer:
        answer = await resolver.resolve(name, dns.rdatatype.AAAA)
    return sorted(record.address for record in answer)[:MOST], answer.chaining_result.minimum_ttl

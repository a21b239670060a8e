"""One port: a listening socket, the Granian worker that accepts on it, and the bridge that gets its requests.

What a worker begins with, such as its certificate, it keeps. So for other options another one begins on the same
socket, and the old one accepts no more and ends when its connections have ended: none is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from balancer.edge import accepted
from balancer.edge.bridge import Bridge
from balancer.edge.granian import Worker, held_back, listening_for_nobody
from balancer.edge.listener import PortOptions
from balancer.edge.tcpsocket import url_of
from balancer.edge.tls import Certificate
from balancer.edge.unixsocket import Unread

log = logging.getLogger("balancer.server")

PASS_SECONDS = 5.0  # at most between two passes over all connections, 0.1 s of work each if there are 10,000
SLICE_PAUSE_SECONDS = 0.005  # between two slices of a pass
RENEW_SECONDS = 1.0  # from one renewal to the next at least: a worker has begun before it is parked
PARKED_SECONDS = 10.0  # in which whoever is connected can come anew: Granian's limit for a handshake
MOST_PARKED = 8  # workers, each with three threads; one more has to wait until another has ended
LONGEST_PARKED = 3600.0  # and no longer: a certificate must not expire because somebody's event stream never ends
CLOSING_SECONDS = 30.0  # in which its WebSockets are told so
LOOK_SECONDS = 1.0  # between two looks whether they have ended
ROOM_SECONDS = 0.5  # between two looks whether a descriptor is left
RESERVE, ROOM = 8, 64  # descriptors that are held back for then, and that there must be to accept again


class Port:
    """`start`, `stop` and `close` once each, in this order, the first two in the event loop's thread.

    `wanted` is what a worker is made of; `renew` replaces it, from any thread. `_parked` are the workers before the
    one that accepts, until they have ended.
    """

    def __init__(
        self, bridge: Bridge, listener: socket.socket, options: PortOptions, certificate: Certificate | None = None
    ) -> None:
        self.bridge = bridge
        name = listener.getsockname()
        self.address: accepted.Local = name if isinstance(name, str) else name[:2]
        self.wanted = options, certificate
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Worker | None = None
        self._next_renewal = 0.0  # of time.monotonic(), at the earliest
        self._keeps_room = False
        self._later: asyncio.TimerHandle | None = None  # a renewal that had to wait
        self._parked: list[Worker] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        return url_of(self.address, "http" if self.wanted[1] is None else "https")

    @property
    def certificate(self) -> Certificate | None:
        """The one that whoever connects is shown."""
        return self.wanted[1] if self._worker is None else self._worker.made_of[1]

    @property
    def is_pending(self) -> bool:
        """It serves with older options or an older certificate still."""
        return self._worker is not None and self._worker.made_of != self.wanted

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker = self._make_worker()
        self._keep(self.bridge.watch())
        self._keep(self._close_unused())

    def renew(self, options: PortOptions, certificate: Certificate | None) -> None:
        """Whoever connects from now on, or a moment later, gets these. From any thread."""
        self.wanted = options, certificate
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._renew)

    def park(self) -> None:
        """Accept no more, and serve on whoever is connected, until `stop`."""
        assert self._worker is not None
        with contextlib.suppress(OSError):
            self._worker.park()
        self._listener.close()

    def has_clients(self) -> bool:
        """Somebody is connected."""
        return any(True for connections in accepted.slices(self.address) for _ in connections)

    def stop(self) -> asyncio.Future[Any]:
        """Accept no more; what it returns is done when all connections have ended."""
        assert self._worker is not None
        self._listener.close()
        workers = [self._worker, *self._parked]
        for worker in workers:
            worker.stop()
        return asyncio.gather(*(worker.stopped for worker in workers))

    def abort(self) -> None:
        """Cut every client off: the drain time is over. First their sockets, or they would be told that they had
        left."""
        self.cut()
        self.bridge.abort()

    def cut(self) -> None:
        """Cut off whoever is still connected, such as a client that is silent in the middle of a request head."""
        accepted.cut_port(self.address)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._listener.close()

    def _keep(self, steps: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make_worker(self) -> Worker:
        self._next_renewal = time.monotonic() + RENEW_SECONDS
        if self.wanted[1] is not None and not self._keeps_room:
            self._keep(self._keep_room(listening_for_nobody(socket.AF_UNIX), held_back(self._listener, RESERVE)))
            self._keeps_room = True
        return Worker(self.bridge, self._listener, *self.wanted)

    def _renew(self) -> None:
        assert self._worker is not None
        if self._worker.made_of == self.wanted or self._is_stopping:
            return
        now = time.monotonic()
        if len(self._parked) >= MOST_PARKED:
            oldest = self._parked[0].parked_at
            if now - oldest >= LONGEST_PARKED:
                self._abort_older(oldest + PARKED_SECONDS)  # no request of this worker began later
            self._renew_in(max(RENEW_SECONDS, oldest + LONGEST_PARKED - now))
            return
        if now < self._next_renewal or not self._has_room(ROOM):
            self._renew_in(max(RENEW_SECONDS, self._next_renewal - now))
            return
        try:
            worker = self._make_worker()
        except (OSError, RuntimeError) as error:
            log.warning("%s is not renewed yet: %s", self.url, error)
            self._renew_in(RENEW_SECONDS)
            return
        with contextlib.suppress(OSError):  # no descriptor is left to look for it: until its end it accepts as well
            self._worker.park()
        self._parked.append(self._worker)
        self._keep(self._end(self._worker))
        self._worker = worker

    def _abort_older(self, then: float) -> None:
        if not isinstance(self.address, str):  # else whoever does not read keeps a worker for `idle_timeout` more
            accepted.cut_all({call.addresses for call in list(self.bridge.calls) if call.started < then})
        self.bridge.abort(then)

    def _renew_in(self, seconds: float) -> None:
        assert self._loop is not None
        if self._later is not None:
            self._later.cancel()
        self._later = self._loop.call_later(seconds, self._renew)

    async def _end(self, parked: Worker) -> None:
        await asyncio.sleep(PARKED_SECONDS)
        await self._end_sockets(parked)
        parked.stop()
        await asyncio.wait([parked.stopped])
        gc.collect()  # what a reload has left refers to itself, and some of it to Granian's threads: they would stay
        self._parked.remove(parked)
        self._renew()  # what had to wait for this

    async def _end_sockets(self, parked: Worker) -> None:
        """WebSockets live on where they are, for a time, or until there are too many such workers. Then they are told:
        `stop` would end them without a word."""
        bridge, parked_at = self.bridge, parked.parked_at
        while bridge.sockets_before(parked_at) and time.monotonic() < parked_at + LONGEST_PARKED:
            if self._parked[0] is parked and len(self._parked) >= MOST_PARKED:
                break
            await asyncio.sleep(LOOK_SECONDS)
        bridge.close_sockets(CLOSING_SECONDS, parked_at)
        deadline = time.monotonic() + CLOSING_SECONDS
        while bridge.sockets_before(parked_at) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)

    async def _keep_room(self, nobody: socket.socket, reserve: contextlib.ExitStack) -> None:
        """Connections whose handshake is not done are no clients yet for `max_clients`. Granian looks at none of them,
        and so ends none, while `accept` fails for want of descriptors: that would be for ever. So a few are held back,
        with which `accept` finds that nobody is there until handshakes have ended."""
        with nobody, reserve:
            while True:
                await asyncio.sleep(ROOM_SECONDS)
                if self._has_room(1) or self._worker is None or self._is_stopping:
                    continue
                log.warning("%s: no descriptor is left; more clients are accepted when there are some", self.url)
                paused = self._worker
                paused.pause(nobody)
                reserve.close()
                while not self._has_room(ROOM):
                    await asyncio.sleep(ROOM_SECONDS)
                reserve.enter_context(held_back(self._listener, RESERVE))
                # Else its descriptor may be somebody else's by now.
                if paused is self._worker and not self._is_stopping:
                    paused.resume(self._listener)
                    self._knock()

    @property
    def _is_stopping(self) -> bool:
        return self._listener.fileno() < 0

    def _has_room(self, descriptors: int) -> bool:
        with contextlib.suppress(OSError), held_back(self._listener, descriptors):
            return True
        return False

    def _knock(self) -> None:
        """Granian looks for those who wait to be accepted when one more comes."""
        with contextlib.suppress(OSError), socket.socket(self._listener.family) as client:
            client.setblocking(False)
            client.connect(self._listener.getsockname())

    async def _close_unused(self) -> None:
        begin = self._passes()
        while True:
            await asyncio.sleep(min(self.wanted[0].header_timeout / 2, PASS_SECONDS))
            try:
                for _ in begin():
                    await asyncio.sleep(SLICE_PAUSE_SECONDS)
            except Exception:  # it must go on, or unused connections would pile up
                log.exception("closing unused connections failed")

    def _passes(self) -> Callable[[], Iterator[None]]:
        """What begins a pass over all connections."""
        bridge = self.bridge
        if isinstance(self.address, str):
            unread = Unread(self.address)
            return lambda: unread.close(max(bridge.limits.idle_timeout, accepted.IDLE_SECONDS))
        # hyper limits the time for a request head in HTTP/1 only, and only once it knows that it is that.
        unused = accepted.Unused(self.address, self.wanted[0].header_timeout)

        def begin() -> Iterator[None]:
            unused.header_timeout = self.wanted[0].header_timeout
            return unused.close(bridge.used(), bridge.handed(), bridge.limits.idle_timeout)

        return begin

"""What serves on one or more ports, in whichever thread: it starts, drains and ends them.

The order of starting and stopping is written once, here; docs/architecture.md lists the threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from balancer.edge.port import Port

log = logging.getLogger("balancer.server")

DRAIN_LOOK_SECONDS = 0.05
PARKED_SECONDS, LOOK_SECONDS = 10.0, 0.5  # for clients to come anew; between two looks whether they have
FLUSH_SECONDS = 1.0  # for connections to end once no request is in flight any more; the others are cut off then
CUT_SECONDS = 1.0  # for Granian to notice that
STOP_SECONDS = 2.0  # for worker threads to end once nothing is in flight

Result = TypeVar("Result")


class Server:
    """Ports that start, drain and end together. The first one is drained, the others are told when that is done: so a
    control port can say what goes on. `run` once.

    `on_start` runs before the first request is accepted, `on_drain` (with a line for people) when the end begins,
    `on_stop` when no request is in flight any more.
    """

    def __init__(
        self,
        ports: list[Port],
        *,
        on_start: Callable[[], None] = lambda: None,
        on_drain: Callable[[str], None] = lambda text: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self.ports = ports
        self._on_start = on_start
        self._on_drain = on_drain
        self._on_stop = on_stop
        self._limits: list[tuple[float, float]] = []  # of what is in flight: until when, of time.monotonic(); seconds

    def run(self, main: Coroutine[Any, Any, Result]) -> Result:
        """Run `main`, which awaits `end`, in an event loop of this thread. All is closed afterwards, whatever fails."""
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                self._on_start()
                return runner.run(main)
        finally:
            self.close()

    def limit(self, seconds: float) -> None:
        """What is in flight when the end comes may go on for so long at most, from now on; the shortest limit counts.
        From any thread."""
        self._limits.append((time.monotonic() + seconds, seconds))

    def close(self) -> None:
        for port in self.ports:
            port.close()
        for pool in {port.bridge.pool for port in self.ports}:
            pool.stop(STOP_SECONDS)
        self._on_stop()

    # In the event loop's thread.

    def start(self) -> None:
        for port in self.ports:
            port.start()

    async def ready(self) -> None:
        """Returns once it serves."""

    def signals(self) -> Mapping[str, Callable[[], None]]:
        """What else it does for signals, by their names, in the event loop."""
        return {}

    async def give_way(self, hurry: asyncio.Future[Any]) -> None:
        """Another process accepts from now on. Whoever is connected is served, and asked to come anew, until nobody is
        left, or only such as have nothing to say."""
        for port in self.ports:
            port.bridge.is_draining = True
            port.park()
        deadline = time.monotonic() + PARKED_SECONDS
        while time.monotonic() < deadline and not hurry.done() and any(port.has_clients() for port in self.ports):
            await asyncio.wait([hurry], timeout=LOOK_SECONDS)

    async def end(self, why: str, limit: float, delay: float = 0.0, hurry: asyncio.Future[Any] | None = None) -> bool:
        """Finish what is in flight, within `limit` seconds after `delay` in which all is served; `hurry` cuts it off.
        True if every client connection has ended."""
        hurry = hurry or asyncio.get_running_loop().create_future()
        self._say_draining(why, limit, delay)
        await asyncio.wait([hurry], timeout=delay)  # served as before, until nobody sends new requests here any more
        first, *others = self.ports
        self.limit(limit)
        await self._close_sockets(first, limit, hurry)
        stopped = [first.stop()]
        await self._drain(first, stopped[0], hurry)
        stopped += [port.stop() for port in others]
        _, left = await asyncio.wait(stopped, timeout=FLUSH_SECONDS)
        if left:
            for port in self.ports:
                port.cut()
            _, left = await asyncio.wait(stopped, timeout=CUT_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS  # for whoever was cut off, to be recorded and put away
        while any(port.bridge.active for port in self.ports) and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_LOOK_SECONDS)
        return not left

    async def _close_sockets(self, port: Port, limit: float, hurry: asyncio.Future[Any]) -> None:
        """WebSockets are told before `stop`, with which Granian ends them without a word."""
        bridge = port.bridge
        bridge.is_leaving = True
        if bridge.open_sockets:
            port.park()
            bridge.close_sockets(limit)
        while bridge.open_sockets and not hurry.done() and time.monotonic() < min(self._limits)[0]:
            await asyncio.wait([hurry], timeout=DRAIN_LOOK_SECONDS)

    def _say_draining(self, why: str, limit: float, delay: float) -> None:
        for port in self.ports:
            port.bridge.is_draining = True
        active = sum(port.bridge.active for port in self.ports)
        more = f", after {delay:g} s in which more are accepted" if delay else ""
        text = f"{active} requests in flight have at most {limit:g} s to finish{more} ({why})"
        log.info("draining: %s", text)
        self._on_drain(text)

    async def _drain(self, port: Port, stopped: asyncio.Future[None], hurry: asyncio.Future[Any]) -> None:
        """Wait for the requests in flight; when their time is over, or in a `hurry`, cut them off."""
        bridge = port.bridge
        while bridge.active and not stopped.done() and not hurry.done() and time.monotonic() < min(self._limits)[0]:
            await asyncio.wait([stopped, hurry], timeout=DRAIN_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if bridge.active:  # if it has stopped, then because all their clients have left
            if not stopped.done():
                cause = "a second signal came" if hurry.done() else f"{min(self._limits)[1]:g} s are over"
                log.warning("%s: cut off %d requests that were still in flight", cause, bridge.active)
            port.abort()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop

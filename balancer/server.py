"""Starts and stops the HTTP server: Granian (Rust, hyper) in this process, in front of one or more bridges.

The order of starting and stopping is written once, in `_Serving`. Threads: `MainThread` runs the event loop, Granian
has native ones of its own, `worker-N` run the app, `health` and `health-probe_N` check the backends.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from granian import http as granian_http
from granian._granian import SocketHolder
from granian.constants import Interfaces
from granian.server.embed import Server

from balancer.bridge import Bridge
from balancer.errors import SettingsError

log = logging.getLogger("balancer.server")

BACKLOG = 4096  # connections the kernel holds while all is busy; it caps this at somaxconn
INTERRUPT_DRAIN_SECONDS = 1.0  # Ctrl-C: somebody is waiting
LAST_RESORT_SECONDS = 2.0  # after the drain time-out, for connections that were cut to end


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server needs of the settings; `settings.Settings` says what each one means."""

    max_clients: int = 10000
    header_timeout: float = 10.0
    max_header_bytes: int = 65536
    drain_timeout: float = 30.0


class _Granian(Server):
    """Granian in this process, on a socket that we bound: its own would share a taken port (SO_REUSEPORT)."""

    def __init__(self, bridge: Bridge, listener: socket.socket, interface: Interfaces, options: ServerOptions) -> None:
        self._listener = listener
        super().__init__(
            bridge,
            interface=interface,
            websockets=False,
            backlog=BACKLOG,
            backpressure=options.max_clients,
            http1_settings=granian_http.HTTP1Settings(
                header_read_timeout=int(options.header_timeout * 1000), max_buffer_size=options.max_header_bytes
            ),
            http2_settings=granian_http.HTTP2Settings(max_headers_size=options.max_header_bytes),
            log_enabled=False,
        )

    def _init_shared_socket(self) -> None:
        """Granian takes the descriptor over; how the holder is made differs by platform."""
        extra: tuple[Any, ...] = () if sys.platform == "win32" else (False,)
        if sys.platform in ("linux", "freebsd"):
            extra += (BACKLOG,)
        self._shd = SocketHolder(self._listener.detach(), *extra)  # type: ignore[assignment, call-arg]


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, not yet accepting. Raises SettingsError for a taken port or an address that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingsError(f"host {host!r}: {error.strerror}; expected an address such as 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this option would let two programs share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        if sys.platform != "linux":
            listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"port {port} on {host} is in use; stop what uses it or set another --port") from None
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def pin(affinity: str) -> None:
    """Pin this process to CPUs: one interpreter uses one CPU anyway, and threads that stay on it hand over cheaply.

    Call before any thread is started. Raises SettingsError for a CPU that is not there.
    """
    if affinity == "none" or not hasattr(os, "sched_setaffinity"):
        return
    available = sorted(os.sched_getaffinity(0))
    wanted = available[-1:] if affinity == "auto" else [int(part) for part in affinity.split(",")]
    if not set(wanted) <= set(available):
        raise SettingsError(f"cpu_affinity {affinity!r}: this process may use the CPUs {available}")
    os.sched_setaffinity(0, wanted)


def serve(
    listeners: list[tuple[Bridge, socket.socket]], options: ServerOptions, on_drain: Callable[[], None] = lambda: None
) -> int:
    """Serve until SIGTERM (finish what is in flight, exit code 0) or SIGINT (quickly, 130); a second signal cuts off.

    The first bridge owns the lifespan; the others share its loop.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Serving(listeners, options, on_drain).run())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class _Serving:
    """The order of starting and stopping, written once."""

    def __init__(
        self, listeners: list[tuple[Bridge, socket.socket]], options: ServerOptions, on_drain: Callable[[], None]
    ) -> None:
        self._bridge = listeners[0][0]
        self._options = options
        self._listeners = listeners
        self._on_drain = on_drain
        self._signals: asyncio.Queue[int] = asyncio.Queue()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            _on_signal(loop, number, self._signals)
        servers = [
            _Granian(bridge, listener, Interfaces.ASGI if bridge is self._bridge else Interfaces.ASGINL, self._options)
            for bridge, listener in self._listeners
        ]
        for bridge, _ in self._listeners:
            bridge.loop = loop
        tasks = [loop.create_task(server.serve()) for server in servers]
        gc.collect()
        gc.freeze()  # what exists now lives as long as the process: the collector need not walk it again
        received = await self._first(tasks)
        if received is None:
            return 1
        log.info("draining: %d requests in flight", self._bridge.active)
        self._on_drain()
        for server in servers:
            server.stop()  # type: ignore[no-untyped-call]
        limit = INTERRUPT_DRAIN_SECONDS if received == signal.SIGINT else self._options.drain_timeout
        await self._drain(tasks, limit)
        return 130 if received == signal.SIGINT else 0

    async def _first(self, tasks: list[asyncio.Task[None]]) -> int | None:
        """The signal that asks for the end, or None if a server ended by itself, which is an error."""
        asked = asyncio.ensure_future(self._signals.get())
        await asyncio.wait([asked, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.cancel()
        for task in tasks:
            if task.done() and task.exception() is not None:
                log.error("the server failed: %s", task.exception())
        return None

    async def _drain(self, tasks: list[asyncio.Task[None]], limit: float) -> None:
        again: asyncio.Future[Any] = asyncio.ensure_future(self._signals.get())
        stopped: asyncio.Future[Any] = asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait([stopped, again], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            log.warning("cut off %d requests that were still in flight", self._bridge.active)
            for bridge, _ in self._listeners:
                bridge.abort()
            await asyncio.wait([stopped], timeout=LAST_RESORT_SECONDS)
        again.cancel()
        if not stopped.done():  # a client connection that nothing ends, so that Granian would wait for ever
            logging.shutdown()
            os._exit(0)


def _on_signal(loop: asyncio.AbstractEventLoop, number: int, queue: asyncio.Queue[int]) -> None:
    try:
        loop.add_signal_handler(number, queue.put_nowait, number)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(queue.put_nowait, number))

"""What Granian (Rust, hyper) insists upon: its ASGI worker in this process, in front of a bridge.

The one place that touches Granian's internals, written for the version that requirements.txt names. Granian's own
embedded server takes each request through an asyncio task; its scheduler hook here is `Bridge.accept` instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import granian._granian
from granian.constants import HTTPModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings

from balancer.edge.bridge import Bridge
from balancer.edge.listener import CONNECTION_WINDOW, READ_BYTES, STREAM_WINDOW

log = logging.getLogger("balancer.server")

_native: Any = granian._granian  # its type stub does not match what it takes

BACKLOG = 4096  # connections the kernel holds while all is busy; it caps this at somaxconn
# Of one HTTP/2 connection; `listener` says what may be unread of it.
STREAMS = 200
SEND_BUFFER = 32768  # bytes that h2 takes of each answer when a client opens its windows and does not read


@dataclass(frozen=True, slots=True)
class PortOptions:
    """What clients may take, by the names of the settings."""

    max_clients: int
    header_timeout: float
    max_header_bytes: int


class _AtOnce:
    """What Granian takes for the event loop: it calls back in its own thread, at once, whoever waits for a piece of a
    body. By way of the event loop's thread that would cost two switches between threads more."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: Any, context: Any = None) -> None:
        try:
            callback(*arguments)
        except BaseException:  # Granian would drop it without a word
            log.exception("callback failed")

    call_soon = call_soon_threadsafe


class Worker:
    """Granian's threads and connections on a socket that we bound, for its own would share a taken port.

    Begins at once, in a thread with an event loop. The socket is Granian's from then on.
    """

    def __init__(self, bridge: Bridge, listener: socket.socket, options: PortOptions) -> None:
        loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[None] = loop.create_future()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self.stopped.set_result, None)

        self._signal = _native.WorkerSignal()
        self._signal.add_cb(tell)
        # How the holder is made differs by platform; it takes the descriptor over.
        is_unix = listener.family == getattr(socket, "AF_UNIX", None)
        extra: tuple[Any, ...] = () if sys.platform == "win32" else (is_unix,)
        if sys.platform in ("linux", "freebsd"):
            extra += (BACKLOG,)
        holder = _native.SocketHolder(listener.detach(), *extra)
        worker = _native.ASGIWorker(
            1,
            (None, holder),
            None,
            1,  # threads of the tokio runtime
            512,  # its own blocking threads: not used here, Granian's default
            1,  # threads that call into Python
            30,
            options.max_clients,
            HTTPModes.http1 if is_unix else HTTPModes.auto,  # `unixsocket` says why
            HTTP1Settings(
                header_read_timeout=int(options.header_timeout * 1000), max_buffer_size=options.max_header_bytes
            ),
            HTTP2Settings(
                max_headers_size=options.max_header_bytes,
                max_concurrent_streams=STREAMS,
                initial_stream_window_size=STREAM_WINDOW,
                initial_connection_window_size=CONNECTION_WINDOW,
                max_send_buffer_size=SEND_BUFFER,
            ),
            bridge.sockets is not None,  # WebSockets
            None,  # static files
            *(False, None, None, None, str(SSLProtocols.tls13), None, [], False),
            (None, None),  # metrics
        )
        scheduler = _native.CallbackScheduler(loop, bridge, None, None, None)
        scheduler._schedule_fn = bridge.accept
        bridge.most_read = max(READ_BYTES, options.max_header_bytes)
        # On Windows Granian makes futures of the event loop, which are for its thread alone.
        serve = worker.serve_async_uds if is_unix else worker.serve_async
        serve(scheduler, loop if sys.platform == "win32" else _AtOnce(), self._signal)

    def stop(self) -> None:
        """Accept no more, finish what is in flight; `stopped` is done when all connections have ended, and Granian's
        threads end by themselves then."""
        self._signal.set()

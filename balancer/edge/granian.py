"""What Granian (Rust, hyper) insists upon: its ASGI worker in this process, in front of a bridge.

The one place that touches Granian's internals, but for the trial in `tls`, written for the version that
requirements.txt names. Granian's own embedded server takes each request through an asyncio task; its scheduler hook
here is `Bridge.accept` instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import granian._granian
from granian.constants import HTTPModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings

from balancer.edge.bridge import Bridge
from balancer.edge.listener import CONNECTION_WINDOW, READ_BYTES, STREAM_WINDOW, PortOptions
from balancer.edge.tcpsocket import BACKLOG
from balancer.edge.tls import Certificate

log = logging.getLogger("balancer.server")

_native: Any = granian._granian  # its type stub does not match what it takes

# Of one HTTP/2 connection; `listener` says what may be unread of it.
STREAMS = 200
SEND_BUFFER = 32768  # bytes that h2 takes of each answer when a client opens its windows and does not read
# What a worker needs to begin: without it Granian would end the process.
DESCRIPTORS, THREADS = 16, 4
PLAIN: tuple[Any, ...] = (False, None, None, None, str(SSLProtocols.tls13), None, [], False)


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

    Begins at once, in a thread with an event loop. A copy of the socket is Granian's from then on, so that the port
    stays ours, whichever worker serves it. Raises OSError or RuntimeError if the machine has no descriptor or no thread
    left.
    """

    def __init__(
        self, bridge: Bridge, listener: socket.socket, options: PortOptions, certificate: Certificate | None = None
    ) -> None:
        _ensure_room(listener)
        self.made_of = (options, certificate)
        self.parked_at = math.inf  # of time.monotonic()
        self._bridge = bridge
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
        self._family, self._descriptor = listener.family, listener.dup().detach()
        holder = _native.SocketHolder(self._descriptor, *extra)
        make = partial(
            _native.ASGIWorker,
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
        )
        scheduler = _native.CallbackScheduler(loop, bridge, None, None, None)
        # Granian takes this once and for all; what is behind it can still be changed, and costs no Python for that.
        self._entry: Any = partial(bridge.accept)
        scheduler._schedule_fn = self._entry
        bridge.most_read = max(READ_BYTES, options.max_header_bytes)
        # On Windows Granian makes futures of the event loop, which are for its thread alone.
        its_loop = loop if sys.platform == "win32" else _AtOnce()
        with contextlib.nullcontext(PLAIN) if certificate is None else certificate.arguments() as tls:
            worker = make(*tls, (None, None))
            (worker.serve_async_uds if is_unix else worker.serve_async)(scheduler, its_loop, self._signal)

    def park(self) -> None:
        """Accept no more, while another worker accepts on a copy of the same socket. Whoever is connected is served on,
        and told to come anew: every answer is the last one of an HTTP/1 connection."""
        self._entry.__setstate__((self._bridge.accept_last, (), {}, None))
        self.parked_at = time.monotonic()  # what it took without being told so is older
        if hasattr(select, "epoll"):
            _take_away(self._descriptor, self._family)

    def pause(self, nobody: socket.socket) -> None:
        """Accept no more until `resume`."""
        os.dup2(nobody.fileno(), self._descriptor, inheritable=False)

    def resume(self, listener: socket.socket) -> None:
        os.dup2(listener.fileno(), self._descriptor, inheritable=False)

    def stop(self) -> None:
        """Accept no more, end idle connections, finish what is in flight; `stopped` is done when all connections have
        ended, and Granian's threads end by themselves then."""
        self._signal.set()


def listening_for_nobody(family: int) -> socket.socket:
    """For what must be a listening socket and is not to accept anything."""
    nobody = socket.socket(family)
    address: Any = ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0)
    nobody.bind("" if family == socket.AF_UNIX else address)  # any name that is free
    nobody.listen(1)
    nobody.setblocking(False)
    return nobody


def held_back(listener: socket.socket, descriptors: int) -> contextlib.ExitStack:
    """So many, until it is closed. Raises OSError if there are not."""
    with contextlib.ExitStack() as held:
        for _ in range(descriptors):
            held.enter_context(listener.dup())
        return held.pop_all()


def _ensure_room(listener: socket.socket) -> None:
    enough = Event()
    with held_back(listener, DESCRIPTORS) as room:
        threads = [Thread(target=enough.wait, name="room", daemon=True) for _ in range(THREADS)]
        try:
            for thread in threads:
                thread.start()
                room.callback(thread.join)
        finally:
            enough.set()


def _take_away(listener: int, family: int) -> None:
    """Granian knows no way to accept no more but to end connections too. So its poller does not see the socket any
    more, and the descriptor is one of a socket to which nobody connects, for a look that is under way."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/self/fd/{name}") != "anon_inode:[eventpoll]":
                continue
            watched = Path(f"/proc/self/fdinfo/{name}").read_text(encoding="ascii")
            if re.search(rf"^tfd:\s*{listener}\b", watched, re.MULTILINE):
                with select.epoll.fromfd(os.dup(int(name))) as poller:
                    poller.unregister(listener)
    with contextlib.suppress(OSError), listening_for_nobody(family) as nobody:
        os.dup2(nobody.fileno(), listener, inheritable=False)

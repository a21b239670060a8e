"""Starts and stops the HTTP server: Granian (Rust, hyper) in this process, in front of one or more bridges.

The order of starting and stopping is written once, in `serve`; docs/architecture.md lists the threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import granian._granian
from granian.constants import HTTPModes, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings

from balancer.edge import accepted
from balancer.edge.bridge import Bridge
from balancer.edge.listener import CONNECTION_WINDOW, READ_BYTES, STREAM_WINDOW
from balancer.edge.signals import Signals
from balancer.errors import SettingsError

log = logging.getLogger("balancer.server")

_native: Any = granian._granian  # its type stub does not match what it takes

BACKLOG = 4096  # connections the kernel holds while all is busy; it caps this at somaxconn
# Of one HTTP/2 connection; `clientbody` says what may be unread of it.
STREAMS = 200
SEND_BUFFER = 32768  # bytes that h2 takes of each answer when a client opens its windows and does not read
INTERRUPT_DRAIN_SECONDS = 1.0  # Ctrl-C: somebody is waiting
STOP_SECONDS = 2.0  # for worker threads to end once nothing is in flight
DRAIN_LOOK_SECONDS = 0.05
# Container objects made and not freed again between two looks of the garbage collector, 700 by default. A plain GET has
# about 20 while it is in flight and leaves no cycles, so that looking more often finds nothing.
GC_THRESHOLD = 20_000
PASS_SECONDS = 5.0  # at most between two passes over all connections, 0.1 s of work each if there are 10,000
SLICE_PAUSE_SECONDS = 0.005  # between two slices of a pass
LAST_RESORT_SECONDS = 1.0  # for connections to end once no request is in flight any more


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the server needs of the settings; `settings.Settings` says what each one means."""

    max_clients: int = 10000
    header_timeout: float = 10.0
    max_header_bytes: int = 65536
    drain_timeout: float = 30.0
    shutdown_delay: float = 0.0


class _AtOnce:
    """What Granian takes for the event loop: it calls back in its own thread, at once, whoever waits for a piece of a
    body. By way of the event loop's thread that would cost two switches between threads more."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: Any, context: Any = None) -> None:
        try:
            callback(*arguments)
        except Exception:  # Granian would drop it without a word
            log.exception("callback failed")

    call_soon = call_soon_threadsafe


class _Granian:
    """Granian's ASGI worker in this process, on a socket that we bound: its own would share a taken port.

    The one place that touches Granian's internals, written for the version that requirements.txt names. Granian's own
    embedded server takes each request through an asyncio task; its scheduler hook here is `Bridge.accept` instead.
    """

    def __init__(self, bridge: Bridge, listener: socket.socket, options: ServerOptions) -> None:
        loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[None] = loop.create_future()
        self._signal = _native.WorkerSignal()
        self._signal.add_cb(lambda: loop.call_soon_threadsafe(self.stopped.set_result, None))
        # How the holder is made differs by platform; it takes the descriptor over.
        extra: tuple[Any, ...] = () if sys.platform == "win32" else (False,)
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
            HTTPModes.auto,
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
            False,  # WebSockets
            None,  # static files
            *(False, None, None, None, str(SSLProtocols.tls13), None, [], False),
            (None, None),  # metrics
        )
        scheduler = _native.CallbackScheduler(loop, bridge, None, None, None)
        scheduler._schedule_fn = bridge.accept
        bridge.most_read = max(READ_BYTES, options.max_header_bytes)
        # On Windows Granian makes futures of the event loop, which are for its thread alone.
        worker.serve_async(scheduler, loop if sys.platform == "win32" else _AtOnce(), self._signal)

    def stop(self) -> None:
        """Accept no more, finish what is in flight; `stopped` is done when all connections have ended."""
        self._signal.set()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError for a taken port or an address that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        cause = getattr(error, "strerror", None) or "not a host name"
        raise SettingsError(f"host {host!r}: {cause}; expected an address such as 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this option would let two programs share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"port {port} on {host} is in use; stop what uses it or set another --port") from None
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def cpus(affinity: str) -> list[int]:
    """CPUs to run on for `cpu_affinity`, [] for no choice. Raises SettingsError for one that is not there."""
    if affinity == "none" or not hasattr(os, "sched_getaffinity"):
        return []
    available = sorted(os.sched_getaffinity(0))
    wanted = available[-1:] if affinity == "auto" else [int(part) for part in affinity.split(",")]
    if not set(wanted) <= set(available):
        raise SettingsError(f"cpu_affinity {affinity!r}: this process may use the CPUs {available}")
    return wanted


def pin(wanted: list[int]) -> None:
    """Pin this process to CPUs: one interpreter uses one CPU anyway, and threads that stay on it hand over cheaply.

    Call before any thread is started.
    """
    if not wanted:
        return
    os.sched_setaffinity(0, wanted)
    # A thread that wakes up must not push the holder of the interpreter lock off the CPU only to wait for that lock:
    # measured, this halves the thread switches per request.
    with contextlib.suppress(OSError):  # musl has no such call, and a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def raise_descriptor_limit() -> int:
    """Allow as many open files as the system lets us, 1024 is a common default; returns how many these are."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard if hard != resource.RLIM_INFINITY else sys.maxsize
    return sys.maxsize  # Windows has no such limit


def serve(
    listeners: list[tuple[Bridge, socket.socket]],
    options: ServerOptions,
    *,
    on_start: Callable[[], None] = lambda: None,
    on_drain: Callable[[str], None] = lambda text: None,
    on_stop: Callable[[], None] = lambda: None,
    on_hangup: Callable[[], None] | None = None,
) -> int:
    """Serve until SIGTERM (finish what is in flight, exit code 0) or SIGINT (quickly, 130); a second signal cuts off.

    `on_start` runs before the first request is accepted, `on_drain` (with a line for people) when a signal has come,
    `on_stop` when no request is in flight any more. `on_hangup` runs for SIGHUP, in a thread of its own; without it
    SIGHUP is as good as SIGTERM.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        on_start()
        try:
            code, ended = runner.run(_serve(listeners, options, on_drain, on_hangup))
        finally:
            for pool in {bridge.pool for bridge, _ in listeners}:
                pool.stop(STOP_SECONDS)
            on_stop()
        if not ended:  # a client that is silent in the middle of a request head: Granian would wait for it
            logging.shutdown()
            os._exit(code)
        return code


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _serve(
    listeners: list[tuple[Bridge, socket.socket]],
    options: ServerOptions,
    on_drain: Callable[[str], None],
    on_hangup: Callable[[], None] | None,
) -> tuple[int, bool]:
    """(exit code, True if every client connection has ended)."""
    loop = asyncio.get_running_loop()
    signals = Signals(on_hangup)
    ports = [listener.getsockname()[1] for _, listener in listeners]
    servers = [_Granian(bridge, listener, options) for bridge, listener in listeners]
    bridges = [bridge for bridge, _ in listeners]
    watches: list[asyncio.Task[Any]] = [loop.create_task(bridge.watch()) for bridge in bridges]
    watches.append(loop.create_task(_close_unused(ports, bridges, options.header_timeout)))
    watches.append(loop.create_task(signals.call_on_hangup()))
    gc.collect()
    gc.freeze()  # what exists now lives as long as the process: the collector need not walk it again
    gc.set_threshold(GC_THRESHOLD)
    received = await signals.ending.get()
    second = loop.create_task(signals.ending.get())
    watches.append(second)
    quick = received == signal.SIGINT
    delay = 0.0 if quick else options.shutdown_delay
    limit = INTERRUPT_DRAIN_SECONDS if quick else options.drain_timeout
    _say_draining(received, bridges, delay, limit, on_drain)
    await asyncio.wait([second], timeout=delay)  # served as before, until nobody sends new requests here any more
    servers[0].stop()  # a control port of its own stays, so that /readyz can say what goes on
    await _drain(servers[0].stopped, second, bridges[0], limit)
    for server in servers[1:]:
        server.stop()
    stopped: asyncio.Future[Any] = asyncio.gather(*(server.stopped for server in servers))
    await asyncio.wait([stopped], timeout=LAST_RESORT_SECONDS)
    for watch in watches:
        watch.cancel()
    signals.join(STOP_SECONDS)
    return 130 if quick else 0, stopped.done()


def _say_draining(
    received: signal.Signals, bridges: list[Bridge], delay: float, limit: float, on_drain: Callable[[str], None]
) -> None:
    for bridge in bridges:
        bridge.is_draining = True
    active = sum(bridge.active for bridge in bridges)
    more = f", after {delay:g} s in which more are accepted" if delay else ""
    text = f"{active} requests in flight have at most {limit:g} s to finish{more} ({received.name})"
    log.info("draining: %s", text)
    on_drain(text)


async def _close_unused(ports: list[int], bridges: list[Bridge], seconds: float) -> None:
    """hyper limits the time for a request head in HTTP/1 only, and only once it knows that it is that."""
    places = [(accepted.Unused(port, seconds), bridge) for port, bridge in zip(ports, bridges, strict=True)]
    while True:
        await asyncio.sleep(min(seconds / 2, PASS_SECONDS))
        for unused, bridge in places:
            try:
                for _ in unused.close(bridge.used(), bridge.handed(), bridge.idle_timeout):
                    await asyncio.sleep(SLICE_PAUSE_SECONDS)
            except Exception:  # it must go on, or unused connections would pile up
                log.exception("closing unused connections failed")


async def _drain(stopped: asyncio.Future[None], second: asyncio.Future[Any], bridge: Bridge, limit: float) -> None:
    """Wait for the requests in flight; after `limit` seconds, or at a second signal, cut them off."""
    deadline = time.monotonic() + limit
    while bridge.active and not stopped.done() and not second.done() and time.monotonic() < deadline:
        await asyncio.wait([stopped, second], timeout=DRAIN_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if bridge.active:  # if it has stopped, then because all their clients have left
        if not stopped.done():
            why = "a second signal came" if second.done() else f"{limit:g} s are over"
            log.warning("%s: cut off %d requests that were still in flight", why, bridge.active)
        bridge.abort()

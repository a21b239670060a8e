"""One port: a listening socket, the Granian worker that accepts on it, and the bridge that gets its requests."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from balancer.edge import accepted
from balancer.edge.bridge import Bridge
from balancer.edge.granian import BACKLOG, PortOptions, Worker
from balancer.edge.unixsocket import Unread
from balancer.errors import SettingsError
from balancer.protocol.origin import unix_url
from balancer.protocol.texts import quoted

log = logging.getLogger("balancer.server")

PASS_SECONDS = 5.0  # at most between two passes over all connections, 0.1 s of work each if there are 10,000
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, seconds, questions
SLICE_PAUSE_SECONDS = 0.005  # between two slices of a pass


class Port:
    """`start`, `stop` and `close` once each, in this order, the first two in the event loop's thread."""

    def __init__(self, bridge: Bridge, listener: socket.socket, options: PortOptions) -> None:
        self.bridge = bridge
        name = listener.getsockname()
        self.address: accepted.Local = name if isinstance(name, str) else name[:2]
        self._listener = listener
        self._options = options
        self._worker: Worker | None = None
        self._watches: list[asyncio.Task[Any]] = []

    @property
    def url(self) -> str:
        if isinstance(self.address, str):
            return unix_url(self.address)
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        # A copy: the port stays ours, whichever worker serves it.
        self._worker = Worker(self.bridge, self._listener.dup(), self._options)
        self._watches = [asyncio.create_task(watch) for watch in (self.bridge.watch(), self._close_unused())]

    def stop(self) -> asyncio.Future[None]:
        """Accept no more; what it returns is done when all connections have ended."""
        assert self._worker is not None
        self._listener.close()
        self._worker.stop()
        return self._worker.stopped

    def abort(self) -> None:
        """Cut every client off: the drain time is over. First their sockets, or they would be told that they had
        left."""
        self.cut()
        self.bridge.abort()

    def cut(self) -> None:
        """Cut off whoever is still connected, such as a client that is silent in the middle of a request head."""
        accepted.cut_port(self.address)

    def close(self) -> None:
        for watch in self._watches:
            watch.cancel()
        self._listener.close()

    async def _close_unused(self) -> None:
        begin = self._passes()
        while True:
            await asyncio.sleep(min(self._options.header_timeout / 2, PASS_SECONDS))
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
        unused = accepted.Unused(self.address, self._options.header_timeout)
        return lambda: unused.close(bridge.used(), bridge.handed(), bridge.limits.idle_timeout)


def _keep_alive(listener: socket.socket) -> None:
    """What is accepted inherits it. So it shows that a client has vanished whose WebSocket is idle: Granian sends no
    pings. Not TCP_USER_TIMEOUT, which would also end whoever pauses a download."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises SettingsError for a taken port or an address that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        cause = getattr(error, "strerror", None) or "not a host name"
        raise SettingsError(f"host {quoted(host)}: {cause}; expected an address such as 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this option would let two programs share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _keep_alive(listener)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(f"port {port} on {host} is in use; stop what uses it or choose another port") from None
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener

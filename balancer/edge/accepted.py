"""Accepted client connections, found among this process's own descriptors.

Granian keeps its sockets to itself, and has no way to cut one off or to see that one has never asked for anything. All
here works on duplicates of descriptors, so that one closed and reused meanwhile cannot be hit.

On Windows nothing is found.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import NamedTuple

from balancer.upstream.tcpinfo import delivered

Address = tuple[str, str]  # host and port, as Granian gives them

IDLE_SECONDS = 75.0  # nginx's keepalive_timeout; hyper itself ends idle HTTP/1.1 connections, but not HTTP/2 ones
LEAST_RATE = 240  # bytes/s, the default of `min_body_rate`: who reads less does not count as reading
SLICE = 64  # descriptors, about half a millisecond: whoever forwards requests waits for the interpreter meanwhile

_passing = Lock()  # held during a pass; `_waiting` needs none, each step on it is one operation
_waiting: set[tuple[Address, Address]] = set()


def cut(addresses: tuple[Address, Address]) -> None:
    """Shut down the connection between (client, server). Those who come while a pass runs share the next one."""
    _waiting.add(addresses)
    with _passing:
        if addresses in _waiting:
            wanted = set(_waiting)
            _waiting.difference_update(wanted)
            cut_all(wanted)


def cut_all(pairs: Iterable[tuple[Address, Address]]) -> None:
    """Shut down the connections between these (client, server) addresses, in one pass over all descriptors."""
    wanted = {((client[0], int(client[1])), (server[0], int(server[1]))) for client, server in pairs}
    for connection in _sockets(_descriptors()):
        with contextlib.suppress(OSError):  # not connected, or no more
            if (connection.getpeername()[:2], connection.getsockname()[:2]) in wanted:
                connection.shutdown(socket.SHUT_RDWR)


class _Seen(NamedTuple):
    """When a connection was last in use, or first seen; how many seconds after that it may stay; and what its client
    had taken by then."""

    at: float
    seconds: float
    taken: int


class Unused:
    """Connections to our `port` that hold a place and do not use it; the passes over all that are open find them.

    Only requests count as use, of which hyper has the whole head: a head that never ends, or PINGs, may come for ever.
    So does reading: answers that were handed over whole may take their client longer than IDLE_SECONDS.

    `_known` has what was seen of each connection that was open at the last pass.
    """

    def __init__(self, port: int, header_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._port = port
        self._header_timeout = header_timeout
        self._clock = clock
        self._known: dict[tuple[Address, int], _Seen] = {}

    def close(self, is_used: Callable[[Address], bool]) -> Iterator[None]:
        """One pass, a SLICE at each step. Shut down what has had no request for `header_timeout`, or for IDLE_SECONDS
        if it had one before. `is_used` says of a client whether it has one, or had one since the pass before."""
        open_now: dict[tuple[Address, int], _Seen] = {}
        descriptors = _descriptors()
        for start in range(0, len(descriptors), SLICE):
            for connection in _sockets(descriptors[start : start + SLICE]):
                with contextlib.suppress(OSError):  # not connected, or no more
                    self._look(connection, is_used, open_now)
            yield
        self._known = open_now

    def _look(
        self,
        connection: socket.socket,
        is_used: Callable[[Address], bool],
        open_now: dict[tuple[Address, int], _Seen],
    ) -> None:
        if connection.getsockname()[1] != self._port:
            return
        host, port = connection.getpeername()[:2]
        client = host, str(port)
        key = client, os.fstat(connection.fileno()).st_ino  # which the next one from the same port does not share
        now = self._clock()
        taken = delivered(connection)
        seen = self._known.get(key) or _Seen(now, self._header_timeout, taken)
        is_reading = seen.seconds == IDLE_SECONDS and taken - seen.taken > LEAST_RATE * (now - seen.at)
        if is_used(client) or is_reading:
            seen = _Seen(now, IDLE_SECONDS, taken)
        open_now[key] = seen
        if now - seen.at >= seen.seconds:
            connection.shutdown(socket.SHUT_RDWR)


def _sockets(descriptors: Iterable[int]) -> Iterator[socket.socket]:
    """A duplicate of each TCP socket, closed again after each step."""
    for descriptor in descriptors:
        duplicate = _duplicate(descriptor)
        if duplicate is not None:
            with duplicate:
                if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                    yield duplicate


def _duplicate(descriptor: int) -> socket.socket | None:
    """None if it is not a socket, or closed meanwhile."""
    with contextlib.suppress(OSError):
        copy = os.dup(descriptor)
        try:
            return socket.socket(fileno=copy)
        except OSError:
            os.close(copy)
    return None


def _descriptors() -> list[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(folder)]
    return []

"""Accepted client connections, found among this process's own descriptors.

Granian keeps its sockets to itself, and has no way to cut one off or to see that one has never asked for anything. All
here works on duplicates of descriptors, so that one closed and reused meanwhile cannot be hit.

On Windows nothing is found.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import NamedTuple

from balancer.upstream.tcpinfo import has_hung_up, traffic

Address = tuple[str, str]  # host and port, as Granian gives them
Local = tuple[str, int] | str  # and of a listening socket, as the kernel does; a path of a Unix socket

EVERYWHERE = ("0.0.0.0", "::")  # to listen on all addresses
IDLE_SECONDS = 75.0  # nginx's keepalive_timeout; hyper itself ends idle HTTP/1.1 connections, but not HTTP/2 ones
LEAST_RATE = 240  # bytes/s, the default of `min_body_rate`: to read less does not count as reading
MOST_OWED = 262_144  # bytes of answers that a client may leave unread for as long as it likes, such as a paused film
TCP, UNIX = (socket.AF_INET, socket.AF_INET6), (getattr(socket, "AF_UNIX", None),)  # families
SLICE = 64  # descriptors, about half a millisecond: whoever forwards requests waits for the interpreter meanwhile


def cut_all(pairs: Iterable[tuple[Address, Address]]) -> None:
    """Shut down the connections between these (client, server) addresses, in one pass over all descriptors."""
    for connection, _ in _between(pairs, _descriptors()):
        with contextlib.suppress(OSError):  # no more
            connection.shutdown(socket.SHUT_RDWR)


def connected(pairs: Iterable[tuple[Address, Address]]) -> set[Address]:
    """Of these (client, server) addresses, clients that have neither hung up nor reset their connection: in one pass
    over all descriptors."""
    pairs, descriptors = list(pairs), _descriptors()
    if not descriptors:  # the system does not tell
        return {client for client, _ in pairs}
    return {client for connection, client in _between(pairs, descriptors) if not has_hung_up(connection)}


def _between(
    pairs: Iterable[tuple[Address, Address]], descriptors: Iterable[int]
) -> Iterator[tuple[socket.socket, Address]]:
    """The connections between these (client, server) addresses, each with its client."""
    wanted = {(client[0], int(client[1]), int(server[1])): (client, server[0]) for client, server in pairs}
    for connection in _sockets(descriptors, TCP):
        with contextlib.suppress(OSError):  # not connected, or no more
            port: int = connection.getsockname()[1]
            host, peer_port = connection.getpeername()[:2]
            client, local = wanted.get((host.partition("%")[0], peer_port, port), (None, ""))  # Granian tells no zone
            if client is not None and _is_from(connection, (local, port)):
                yield connection, client


def cut_port(local: Local) -> None:
    """Shut down all connections that were accepted on this port."""
    for connections in slices(local):
        for connection in connections:
            with contextlib.suppress(OSError):  # no more
                connection.shutdown(socket.SHUT_RDWR)


def slices(local: Local) -> Iterator[Iterator[socket.socket]]:
    """All connections that were accepted there, of a SLICE of descriptors at each step."""
    descriptors = _descriptors()
    for start in range(0, len(descriptors), SLICE):
        yield _accepted(descriptors[start : start + SLICE], local)


def _accepted(descriptors: Iterable[int], local: Local) -> Iterator[socket.socket]:
    for connection in _sockets(descriptors, UNIX if isinstance(local, str) else TCP):
        with contextlib.suppress(OSError):  # not connected, or no more; who listens may be shared with others
            connection.getpeername()
            if _is_from(connection, local):
                yield connection


def _is_from(connection: socket.socket, local: Local) -> bool:
    """If it was accepted there: another server in this process may have the same port of another address."""
    if isinstance(local, str):
        return bool(connection.getsockname() == local)
    host, port = connection.getsockname()[:2]
    return port == local[1] and (host == local[0] or local[0] in EVERYWHERE)


class _Seen(NamedTuple):
    """Of one connection, at a pass over all."""

    used_at: float  # or when it was first seen
    seconds: float  # for which it may stay after that
    acked: int  # bytes that its client has acknowledged
    owed: int  # bytes of whole answers that it may not have read yet
    taken: int  # bytes beyond those that it has sent itself, at
    read_at: float  # which time it was last seen to read


class Unused:
    """Connections to `local` that hold a place and do not use it; the passes over all that are open find them.

    Only requests count as use, of which hyper has the whole head: a head that never ends, or PINGs, may come for ever.
    So does reading: answers that were handed over whole may take their client longer than IDLE_SECONDS. One that
    was handed more than MOST_OWED and does not read is shut down, whatever else it sends: hyper keeps all of that.

    `_known` has what was seen of each connection that was open at the last pass.
    """

    def __init__(self, local: Local, header_timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._local = local
        self.header_timeout = header_timeout
        self._clock = clock
        self._known: dict[tuple[Address, int], _Seen] = {}

    def close(
        self,
        is_used: Callable[[Address], bool],
        handed: Mapping[Address, int] | None = None,
        idle_timeout: float = math.inf,
    ) -> Iterator[None]:
        """One pass, a SLICE at each step. Shut down what has had no request for `header_timeout`, or for IDLE_SECONDS
        if it had one before, and what has not read for `idle_timeout` though it should.

        `is_used` says of a client whether it has a request, or had one since the pass before; `handed` are the bytes
        that were handed over for it since then.
        """
        open_now: dict[tuple[Address, int], _Seen] = {}
        for connections in slices(self._local):
            for connection in connections:
                with contextlib.suppress(OSError):  # no more
                    self._look(connection, is_used, handed or {}, idle_timeout, open_now)
            yield
        self._known = open_now

    def _look(
        self,
        connection: socket.socket,
        is_used: Callable[[Address], bool],
        handed: Mapping[Address, int],
        idle_timeout: float,
        open_now: dict[tuple[Address, int], _Seen],
    ) -> None:
        host, port = connection.getpeername()[:2]
        client, now = (host, str(port)), self._clock()
        key = client, os.fstat(connection.fileno()).st_ino  # which the next one from the same port does not share
        acked, received = traffic(connection)
        taken = acked - received  # what a PING brings, its answer takes away again
        used_at, seconds, acked_before, owed, taken_before, read_at = self._known.get(
            key, _Seen(now, self.header_timeout, 0, 0, taken, now)
        )
        owed = max(0, owed + handed.get(client, 0) - (acked - acked_before))
        has_read = taken - taken_before > LEAST_RATE * (now - read_at)
        if is_used(client) or (has_read and seconds == IDLE_SECONDS):
            used_at, seconds = now, IDLE_SECONDS
        if has_read or owed <= MOST_OWED:
            taken_before, read_at = taken, now
        open_now[key] = _Seen(used_at, seconds, acked, owed, taken_before, read_at)
        if now - used_at >= seconds or now - read_at >= idle_timeout:
            connection.shutdown(socket.SHUT_RDWR)


def _sockets(descriptors: Iterable[int], families: Container[object]) -> Iterator[socket.socket]:
    """A duplicate of each socket of these families, closed again after each step."""
    for descriptor in descriptors:
        duplicate = _duplicate(descriptor)
        if duplicate is not None:
            with duplicate:
                if duplicate.family in families:
                    yield duplicate


def _duplicate(descriptor: int) -> socket.socket | None:
    """None if it is not a socket, or closed meanwhile. No file is touched: to close a duplicate of it would end all
    locks that this process has on it, such as SQLite's (fcntl(2))."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return None
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

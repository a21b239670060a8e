"""Accepted client connections, found among this process's own descriptors.

Granian keeps its sockets to itself, and has no way to cut one off or to see that one has never said anything. Each
function works on duplicates of descriptors, so that one closed and reused meanwhile cannot be hit.

On Windows nothing is found, and `close_silent` needs Linux.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from threading import Lock

Address = tuple[str, str]  # host and port, as Granian gives them

# Of HTTP/2 (RFC 9113 section 3.4). hyper tells the protocol by them, and its own time-outs start after that.
PREFACE_BYTES = 24
IDLE_SECONDS = 75.0  # nginx's keepalive_timeout; hyper itself ends idle HTTP/1.1 connections, but not HTTP/2 ones
SLICE = 64  # descriptors, about half a millisecond: whoever forwards requests waits for the interpreter meanwhile
# struct tcp_info of linux/tcp.h, unchanged since 4.2: milliseconds since the last data, and bytes received.
_LAST_DATA, _RECEIVED, _INFO_SIZE = 52, 128, 136

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


def close_silent(port: int, seconds: float, busy: Collection[Address]) -> Iterator[None]:
    """Shut down connections to our `port` that hold a place and do not use it, a SLICE at each step.

    Those that have sent less than PREFACE_BYTES and then nothing for `seconds`; and those without a request in flight,
    which is to say not in `busy`, that have sent nothing for IDLE_SECONDS.
    """
    descriptors = _descriptors()
    for start in range(0, len(descriptors), SLICE):
        for connection in _sockets(descriptors[start : start + SLICE]):
            with contextlib.suppress(OSError):  # not connected, or no more
                _close_if_silent(connection, port, seconds, busy)
        yield


def _close_if_silent(connection: socket.socket, port: int, seconds: float, busy: Collection[Address]) -> None:
    if connection.getsockname()[1] != port:
        return
    host, peer_port = connection.getpeername()[:2]
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
    (quiet,) = struct.unpack_from("I", info, _LAST_DATA)
    (received,) = struct.unpack_from("Q", info, _RECEIVED)
    limit = seconds if received < PREFACE_BYTES else IDLE_SECONDS
    if quiet > limit * 1000 and (host, str(peer_port)) not in busy:
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

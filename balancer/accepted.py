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
from collections.abc import Iterable, Iterator

Address = tuple[str, str]  # host and port, as Granian gives them

# Of HTTP/2 (RFC 9113 section 3.4). hyper tells the protocol by them, and its own time-outs start after that.
PREFACE_BYTES = 24
# struct tcp_info of linux/tcp.h, unchanged since 4.2: milliseconds since the last data, and bytes received.
_LAST_DATA, _RECEIVED, _INFO_SIZE = 52, 128, 136


def cut(pairs: Iterable[tuple[Address, Address]]) -> None:
    """Shut down the connections between these (client, server) addresses, in one pass."""
    wanted = {((client[0], int(client[1])), (server[0], int(server[1]))) for client, server in pairs}
    for connection in _sockets():
        with contextlib.suppress(OSError):  # not connected, or no more
            if (connection.getpeername()[:2], connection.getsockname()[:2]) in wanted:
                connection.shutdown(socket.SHUT_RDWR)


def close_silent(port: int, seconds: float) -> None:
    """Shut down connections to our `port` that have sent less than PREFACE_BYTES and then nothing for `seconds`."""
    for connection in _sockets():
        with contextlib.suppress(OSError):  # not connected, or no more
            if connection.getsockname()[1] != port or not connection.getpeername():
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            (quiet,) = struct.unpack_from("I", info, _LAST_DATA)
            (received,) = struct.unpack_from("Q", info, _RECEIVED)
            if received < PREFACE_BYTES and quiet > seconds * 1000:
                connection.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[socket.socket]:
    """A duplicate of every TCP socket, closed again after each step."""
    for descriptor in _descriptors():
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

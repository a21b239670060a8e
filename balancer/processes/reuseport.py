"""One port, several listening sockets: the kernel gives each new connection to one of them (SO_REUSEPORT, socket(7)).

It numbers them in the order in which they began to listen, and the last one takes the place of one that is closed. So
the one that is closed is always the last.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
from collections.abc import Sequence

from balancer.edge import tcpsocket

log = logging.getLogger("balancer.processes")

SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h; Python has no name for it
# Steps of classic BPF (linux/filter.h): load a random number, take it modulo the number of sockets, return that.
LOAD, MODULO, RETURN, RANDOM = 0x20, 0x94, 0x16, 0xFFFFF000 + 56
WAITING = struct.Struct("24xI")  # of struct tcp_info, tcpi_unacked: of a listening socket, who waits to be accepted


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """So many sockets. Raises SettingsError, also if somebody else listens there in the same way."""
    with tcpsocket.listen(host, port) as alone:
        port = alone.getsockname()[1]
    return [listen_too(host, port) for _ in range(count)]


def listen_too(host: str, port: int) -> socket.socket:
    """One more."""
    return tcpsocket.listen(host, port, is_shared=True)


def steer(listeners: Sequence[socket.socket], count: int) -> None:
    """New connections go to the first `count` of them."""
    steps = b"".join(
        struct.pack("=HBBI", code, 0, 0, value) for code, value in ((LOAD, RANDOM), (MODULO, count), (RETURN, 0))
    )
    program = ctypes.create_string_buffer(steps)
    given = struct.pack("@HP", len(steps) // 8, ctypes.addressof(program))
    try:
        listeners[0].setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, given)
    except OSError as error:
        log.warning("new connections cannot be kept away from a worker that ends: %s", error)


def waiting(listener: socket.socket) -> int:
    """Connections that nobody has accepted yet."""
    found: tuple[int] = WAITING.unpack(listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, WAITING.size))
    return found[0]

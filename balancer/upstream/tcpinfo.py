"""What the kernel tells of a TCP connection: struct tcp_info of linux/tcp.h, whose beginning is unchanged since 4.2."""

from __future__ import annotations

import select
import socket
import struct
import sys

IS_TOLD = sys.platform == "linux"
OPTION = int(getattr(socket, "TCP_INFO", 0))
SIZE = 136  # bytes that are of interest
ESTABLISHED = 1  # the state, which is the first byte
ACKED_AT, RECEIVED_AT = 120, 128  # bytes that the peer has acknowledged, and bytes that it has sent

state_and_received = struct.Struct("@B127xQ").unpack_from  # at 0 and RECEIVED_AT
count_at = struct.Struct("@Q").unpack_from


_HANGUP = int(getattr(select, "POLLRDHUP", 0))


def has_hung_up(connection: socket.socket) -> bool:
    """The peer sends no more, whatever of that has been read; False where the system does not tell."""
    if not _HANGUP:
        return False
    poller = select.poll()
    poller.register(connection, _HANGUP)
    return bool(poller.poll(0))


def traffic(connection: socket.socket) -> tuple[int, int]:
    """(bytes that the peer has acknowledged, bytes that it has sent); zeros where the kernel does not tell."""
    info = connection.getsockopt(socket.IPPROTO_TCP, OPTION, SIZE) if IS_TOLD else b""
    return (0, 0) if len(info) < SIZE else (count_at(info, ACKED_AT)[0], count_at(info, RECEIVED_AT)[0])

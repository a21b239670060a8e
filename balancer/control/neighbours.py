"""Who is at the other end of a connection from this machine: the user that owns the socket there."""

from __future__ import annotations

import ipaddress
import os
import stat
import time
from functools import lru_cache
from pathlib import Path

from balancer.protocol.addresses import Address, parse

TABLES = {4: Path("/proc/net/tcp"), 6: Path("/proc/net/tcp6")}
ADDRESS, STATE, USER = 1, 3, 7  # columns: the local end in hexadecimal, what has become of it, and who owns it
TIME_WAIT = "06"  # of an earlier connection from the same port; the kernel says root of these


def is_ours(host: str, port: str) -> bool:
    """Whether the client at this address of this machine runs as our own user. True where nobody can tell.

    A proxy that adds nothing to what it forwards looks like any program, but mostly runs as a user of its own.
    """
    user = owner(host, port)
    return user is None or user == os.geteuid()


def was_ours(host: str, port: str) -> bool:
    """The same within this minute, for what is only told: the kernel goes through all connections of the machine."""
    return _was_ours(host, port, int(time.monotonic() / 60))


@lru_cache(64)
def _was_ours(host: str, port: str, minute: int) -> bool:
    return is_ours(host, port)


def is_private(path: str) -> bool:
    """Whether our own user alone may connect to the Unix socket there, as far as its own mode tells: it cannot be seen
    who does."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)  # unix(7)


def owner(host: str, port: str) -> int | None:
    """The id of the user, None if the kernel does not tell (proc(5), /proc/net/tcp)."""
    address = parse(host)
    if address is None:
        return None
    found = _owner(address, port)
    if found is None and address.version == 4:  # an IPv6 socket may speak IPv4
        found = _owner(ipaddress.IPv6Address(f"::ffff:{address}"), port)
    return found


def _owner(address: Address, port: str) -> int | None:
    try:
        wanted = f"{_hexadecimal(address)}:{int(port):04X}"
        with TABLES[address.version].open(encoding="ascii") as table:
            for line in table:
                if wanted in line and (columns := line.split())[ADDRESS] == wanted and columns[STATE] != TIME_WAIT:
                    return int(columns[USER])
    except (OSError, ValueError, IndexError):
        return None
    return None


def _hexadecimal(address: Address) -> str:
    """As that table has it: words of four bytes in the machine's own order."""
    packed = address.packed
    words = [packed[start : start + 4] for start in range(0, len(packed), 4)]
    return "".join(word[::-1].hex().upper() for word in words)

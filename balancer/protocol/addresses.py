"""Addresses as values: whoever compares, counts or shows one has it from here, however it was written.

One address has many spellings: with a port, in brackets, with an IPv6 zone, or, as a socket that listens on `::` sees
clients of IPv4, mapped into IPv6 (RFC 4291 section 2.5.5.2).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from socket import AF_INET6, inet_ntop, inet_pton
from typing import Final, Literal

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
UNIX: Final = "unix:"  # in place of an address, of those who come through a Unix socket; as nginx has it
Network = ipaddress.IPv4Network | ipaddress.IPv6Network | Literal["unix:"]
MAPPED_BITS = 96  # of an IPv6 address, before the IPv4 address that is mapped into it
MAPPED = bytes(10) + b"\xff\xff"

_WITH_PORT = re.compile(r"(?:\[([^]]*)\]|([^:]*))(?::[A-Za-z0-9._-]*)?\Z")  # RFC 7239 section 6: or a made-up one
# A comma in quotes separates nothing (RFC 9110 section 5.6.4).
_QUOTED = rb'"(?:[^"\\]|\\.)*"'
_ELEMENT = re.compile(rb'(?:[^",]|%s)+' % _QUOTED)
_ELEMENTS = re.compile(rb'(?:[^"]|%s)*\Z' % _QUOTED)
_PAIR = re.compile(rb'([^\s=;]+)\s*=\s*(%s|[^;"]*)' % _QUOTED)


def parse(text: str) -> Address | None:
    """Less a zone, which may be any text and means nothing to anyone else. None for a name, or anything made up."""
    match = _WITH_PORT.match(text)
    bare = (match[1] or match[2] or "") if match else text
    try:
        found = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def plain(host: str) -> str:
    """The one spelling of a peer's address. What is none stays as it is."""
    return str(parse(host) or host) if ":" in host else host


def is_loopback(host: str) -> bool:
    """Of this machine."""
    found = parse(host)
    return host == "localhost" or host.startswith(UNIX) if found is None else found.is_loopback


def parse_network(text: str) -> Network:
    """Raises ValueError."""
    if text == UNIX.removesuffix(":"):
        return UNIX
    found = ipaddress.ip_network(text)
    mapped = getattr(found.network_address, "ipv4_mapped", None) if found.prefixlen >= MAPPED_BITS else None
    return found if mapped is None else ipaddress.ip_network((mapped, found.prefixlen - MAPPED_BITS))


def is_in_networks(host: str, networks: Sequence[Network]) -> bool:
    if host == UNIX:
        return UNIX in networks
    found = parse(host) if networks else None
    return found is not None and any(network != UNIX and found in network for network in networks)


def network_of(host: str) -> str:
    """One customer has a whole /64 of IPv6 addresses (RFC 6177); an IPv4 address stands for itself."""
    if ":" not in host:
        return host
    try:
        packed = inet_pton(AF_INET6, host)  # as nearly all are spelt, and in a tenth of the time
    except (OSError, ValueError):
        packed = b""
    if packed and not packed.startswith(MAPPED):
        return inet_ntop(AF_INET6, packed[:8] + bytes(8))
    found = parse(host)
    if found is None:
        return host
    return str(ipaddress.IPv6Address(int(found) >> 64 << 64) if found.version == 6 else found)


def told_clients(values: Callable[[bytes], Sequence[bytes]]) -> str:
    """Whom proxies have named, each one's client after that of the one before, with commas between: in
    `X-Forwarded-For`, else in `Forwarded` (RFC 7239 section 4). `values` gives those of a field."""
    told = values(b"x-forwarded-for")
    if not told:
        forwarded = b",".join(values(b"forwarded"))
        if not _ELEMENTS.match(forwarded):  # an open quote would hide what the next proxy has added
            return ""
        told = [_node(element) for element in _ELEMENT.findall(forwarded)]
    return b",".join(told).decode("latin-1")


def _node(element: bytes) -> bytes:
    return next((node.strip(b'" ') for name, node in _PAIR.findall(element) if name.lower() == b"for"), b"")


def client_address(peer: str, told: str, trusted: Sequence[Network]) -> str:
    """Who sent the request: the nearest address that is not a trusted proxy's. `told` is of `told_clients`."""
    address = peer
    if not (told and trusted):
        return peer
    for claim in filter(str.strip, reversed(told.split(","))):
        if not is_in_networks(address, trusted):
            break
        found = parse(claim.strip('" '))
        if found is None:
            break
        address = str(found)
    return address

"""What tells requests apart, or makes them belong together: a client, a host, a path, the value of one field."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from balancer.protocol.addresses import Network, client_address, network_of, told_clients
from balancer.protocol.tables import Table

if TYPE_CHECKING:
    from balancer.protocol.request import Request

TOKEN_PATTERN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}"
KEY_PATTERN = rf"(?:client_ip|path|(?:header|cookie|query):{TOKEN_PATTERN})"
CLIENTS_ROOM, CLIENT_BYTES, LONGEST_TOLD = 1_000_000, 400, 200  # of what proxies tell: room for 2,000 clients

Key = Callable[["Request"], bytes]  # b"" for a request that has none


def request_key(text: str, trusted: Sequence[Network] = ()) -> Key:
    """`client_ip` (behind `trusted` proxies, of IPv6 the /64), `path`, `header:NAME`, `cookie:NAME` or `query:NAME`.

    What is looked at is what backends get, so that they cannot see another key than we do.
    """
    kind, _, name = text.partition(":")
    if kind == "client_ip":
        client = network_of_client(trusted)
        return lambda request: client(request).encode()
    if kind == "path":
        return lambda request: request.path.encode("latin-1")
    if kind == "header":
        return lambda request: field(request, name.lower().encode())
    if kind == "cookie":
        return lambda request: cookie(request, name.encode())
    wanted = re.compile(rb"(?:^|&)%s=([^&]*)" % re.escape(name.encode()))
    return lambda request: unquote_to_bytes(_first(wanted, request.target.partition(b"?")[2]))


def field(request: Request, name: bytes) -> bytes:
    """All lines of it in one, as RFC 9110 section 5.3 has it; a cookie's by its own rule."""
    return (b"; " if name == b"cookie" else b", ").join(
        [value for found, value in request.head.lines if found.lower() == name]
    )


def cookie(request: Request, name: bytes) -> bytes:
    """The value of the first one of this name, which is the one with the longest path (RFC 6265 section 5.4)."""
    for crumb in field(request, b"cookie").split(b";"):
        found, _, value = crumb.strip().partition(b"=")
        if found == name:
            return value.strip(b'"')
    return b""


def host_of(request: Request) -> bytes:
    """In lower case, without the port and the dot that makes a name absolute; empty if there is none."""
    hosts = request.values(b"host")
    return host_name(hosts[0]) if hosts else b""


def host_name(authority: bytes) -> bytes:
    lowered = authority.lower()
    name, colon, port = lowered.rpartition(b":")
    return (name if colon and not port.endswith(b"]") else lowered).rstrip(b".")


def network_of_client(trusted: Sequence[Network]) -> Callable[[Request], str]:
    """Whose a request is; of IPv6 the /64. Behind `trusted` proxies that is worked out once for each client."""
    if not trusted:
        return lambda request: network_of(request.peer)
    known = Table(lambda told: network_of(client_address(*told, trusted)), CLIENTS_ROOM, _weigh_client)
    return lambda request: known[request.peer, told_clients(request.values)]


def _weigh_client(told: tuple[str, str], network: str) -> int:
    return CLIENT_BYTES + len(told[1]) if len(told[1]) <= LONGEST_TOLD else 0


def _first(pattern: re.Pattern[bytes], text: bytes) -> bytes:
    found = pattern.search(text)
    return found[1] if found else b""

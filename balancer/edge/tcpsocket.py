"""TCP sockets that we listen on."""

from __future__ import annotations

import errno
import os
import socket

from balancer.edge.accepted import Local
from balancer.errors import SettingsError
from balancer.protocol.origin import unix_url
from balancer.protocol.texts import quoted

BACKLOG = 4096  # connections the kernel holds while all is busy; it caps this at somaxconn
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, seconds, questions


def url_of(address: Local, scheme: str) -> str:
    """What clients call it; a path is that of a Unix socket."""
    if isinstance(address, str):
        return unix_url(address).replace("http", scheme, 1)
    host, port = address
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _keep_alive(listener: socket.socket) -> None:
    """What is accepted inherits it. So it shows that a client has vanished whose WebSocket is idle: Granian sends no
    pings. Not TCP_USER_TIMEOUT, which would also end whoever pauses a download."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(host: str, port: int, is_shared: bool = False) -> socket.socket:
    """A listening socket; one that is shared is one of several on this port. Raises SettingsError for a taken port or
    an address that is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        cause = getattr(error, "strerror", None) or "not a host name"
        raise SettingsError(f"host {quoted(host)}: {cause}; expected an address such as 127.0.0.1") from None
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on Windows this option would let two programs share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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

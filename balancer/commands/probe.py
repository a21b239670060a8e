"""`--probe`: is the balancer ready that has these settings? For HEALTHCHECK of a container, and for scripts."""

from __future__ import annotations

import socket
import ssl
import time

from balancer.config.settings import Settings
from balancer.errors import SettingsError
from balancer.protocol.addresses import UNIX
from balancer.protocol.texts import quoted

PATHS = ("readyz", "livez", "health")
PROBE_SECONDS = 3.0  # for all of it
STATUS_LINE = len(b"HTTP/1.1 200")
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a socket that listens on all addresses is reached


def probe(config: Settings, path: str) -> tuple[int, str]:
    """(exit code, what was asked and what came). Raises SettingsError if the settings do not say where to ask."""
    target = f"{config.control_prefix}/{path}"
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    where, family, address = _where(config)
    deadline = time.monotonic() + PROBE_SECONDS
    head = b""

    def timed(sock: socket.socket) -> socket.socket:
        sock.settimeout(max(0.001, deadline - time.monotonic()))  # 0 would mean something else
        return sock

    try:
        with socket.socket(family, socket.SOCK_STREAM) as plain:
            timed(plain).connect(address)
            with plain if config.tls_certificate is None else _encrypted(timed(plain)) as sock:
                sock.sendall(request.encode("ascii"))
                while len(head) < STATUS_LINE:
                    timed(sock)
                    piece = sock.recv(STATUS_LINE - len(head))
                    if not piece:
                        return 1, f"{where}{target}: no answer"
                    head += piece
    except OSError as error:
        return 1, f"{where}{target}: {error.strerror or error}"
    status = head[-3:].decode("latin-1")
    return int(status != "200"), f"{where}{target}: {status}"


def _where(config: Settings) -> tuple[str, socket.AddressFamily, tuple[str, int] | str]:
    """Where the control API is, for people and for `connect`."""
    if config.host.startswith(UNIX) and config.control_port is None:
        return config.host, socket.AF_UNIX, config.host.removeprefix(UNIX)
    host, port = EVERYWHERE.get(config.control_host, config.control_host), config.control_port or config.port
    if port == 0:
        raise SettingsError("port 0 is any free one, so only the balancer knows where to ask; expected its port")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:
        raise SettingsError(f"host {quoted(host)}: {getattr(error, 'strerror', None) or error}") from None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}", family, (host, port)


def _encrypted(sock: socket.socket) -> ssl.SSLSocket:
    """Nothing secret is sent and only a status is believed, so the certificate may be for any name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock)

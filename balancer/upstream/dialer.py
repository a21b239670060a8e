"""Opens connections to backends: name, address, TLS. One time limit holds for all of it."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

from balancer.errors import ConnectFailed, ConnectTimedOut, OutOfDescriptors
from balancer.protocol.origin import Origin
from balancer.upstream.connection import Connection
from balancer.upstream.names import Address, Names

NEXT_ADDRESS_SECONDS = 0.25  # for which one is tried alone (RFC 8305 section 5)
MOST_ADDRESSES = 16  # of one name that are tried


class Dialer:
    """Any thread may dial. Without `tls`, certificates are checked against the system's CAs."""

    def __init__(self, tls: ssl.SSLContext | None = None, names: Names | None = None) -> None:
        self._tls = tls
        self._names = names or Names()

    def dial(self, origin: Origin, seconds: float, server_name: str | None = None) -> Connection:
        """A new connection within so many seconds. `server_name` is what the backend is called over TLS, None for its
        host. Raises ConnectFailed, ConnectTimedOut, OutOfDescriptors."""
        deadline = time.monotonic() + seconds
        sock = self._connect(origin, seconds, deadline)
        try:
            if not origin.is_unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.scheme == "https":
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock = self._wrap(sock, origin, seconds, server_name)
            else:
                sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return Connection(sock, origin)

    def begin(self, origin: Origin) -> Connection | None:
        """One that will be connected, or will have failed to, once it can be written to. None if that may take more
        than one address, or waiting. Raises OSError."""
        if origin.scheme != "http":
            return None
        addresses = self._names.find(origin.address or origin.host, origin.port, 0)
        if len(addresses) > 1:
            return None
        sock = _begin(*addresses[0], 0)
        sock.settimeout(None)
        return Connection(sock, origin)

    def _connect(self, origin: Origin, seconds: float, deadline: float) -> socket.socket:
        missing = "was not resolved"
        try:
            if origin.is_unix:
                missing = "did not accept"
                return _connect_unix(origin, seconds)
            addresses = self._names.find(origin.address or origin.host, origin.port, seconds)
            missing = "did not accept"
            return first_to_accept(in_turns(addresses)[:MOST_ADDRESSES], deadline)
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url} {missing} within {seconds:.3g} s") from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfDescriptors("the load balancer may open no more connections, raise its file limit") from None
            refused = isinstance(error, ConnectionRefusedError | FileNotFoundError)  # the latter of a Unix socket
            raise ConnectFailed(f"{origin.url}: {error.strerror or error}", refused=refused) from error

    def _wrap(self, sock: socket.socket, origin: Origin, seconds: float, server_name: str | None) -> ssl.SSLSocket:
        if self._tls is None:
            self._tls = tls_context()
        try:
            return self._tls.wrap_socket(sock, server_hostname=name_for(origin, server_name))
        except TimeoutError:
            raise ConnectTimedOut(f"{origin.url}: no TLS handshake within {seconds:.3g} s") from None
        except (OSError, ValueError) as error:
            raise ConnectFailed(f"{origin.url}: TLS: {error}") from error


def tls_context(cafile: Path | None = None, cadata: str | None = None) -> ssl.SSLContext:
    """Checks certificates against these CAs, or the system's. From Python 3.13 on it would refuse some that every other
    client takes, for want of a key identifier (RFC 5280 section 4.2.1.1): many private CAs, and those of EKS."""
    made = ssl.create_default_context(cafile=cafile, cadata=cadata)
    made.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return made


def name_for(origin: Origin, server_name: str | None) -> str:
    """What a backend is called over TLS."""
    return server_name.removesuffix(".") if server_name else origin.name


def in_turns(addresses: Sequence[Address]) -> list[Address]:
    """Families in turns, so that a dead one keeps nobody for long (RFC 8305 section 4)."""
    preferred = [address for address in addresses if address[0] == addresses[0][0]]
    others = [address for address in addresses if address[0] != addresses[0][0]]
    return [address for address in chain.from_iterable(zip_longest(preferred, others)) if address is not None]


def first_to_accept(addresses: Sequence[Address], deadline: float) -> socket.socket:
    """A connection to one of them. While one is pending the next is tried, NEXT_ADDRESS_SECONDS later or sooner, so
    that each has its share of the time (RFC 8305 section 5). Raises TimeoutError at the deadline, which is of
    time.monotonic(); OSError if all have failed before."""
    next_at = now = time.monotonic()
    if len(addresses) == 1:  # by far the most: a race costs twice as much
        return _begin(*addresses[0], max(0.001, deadline - now))
    pause = min(NEXT_ADDRESS_SECONDS, (deadline - now) / len(addresses))
    left = deque(addresses)
    failure = OSError("no address")
    with selectors.DefaultSelector() as pending:
        try:
            while left or pending.get_map():
                if (now := time.monotonic()) >= deadline:
                    raise TimeoutError
                if left and (now >= next_at or not pending.get_map()):
                    next_at = now + pause
                    try:
                        pending.register(_begin(*left.popleft(), 0), selectors.EVENT_WRITE)
                    except OSError as error:
                        failure = error
                    continue
                for key, _ in pending.select(min(deadline, next_at if left else deadline) - now):
                    sock = cast(socket.socket, key.fileobj)
                    pending.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if not code:
                        return sock
                    sock.close()
                    failure = OSError(code, os.strerror(code))
            raise failure
        finally:
            for key in pending.get_map().values():
                cast(socket.socket, key.fileobj).close()


def _begin(family: int, address: tuple[Any, ...], seconds: float) -> socket.socket:
    """A socket that has connected, or with 0 `seconds` is about to."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(address)
    except BlockingIOError:
        pass
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_unix(origin: Origin, seconds: float) -> socket.socket:
    """Where the queue of the listener is full, only a socket that blocks is let wait (unix(7), EAGAIN)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        Connection(sock, origin).set_timeout(seconds)
        sock.connect(origin.host)
    except BlockingIOError:
        sock.close()
        raise TimeoutError from None
    except BaseException:
        sock.close()
        raise
    return sock

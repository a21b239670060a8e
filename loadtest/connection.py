"""One connection to the target: send a request, take the answer, say what went wrong.

http.client parses the answers; requests are bytes built beforehand, so its request side, two thirds of its cost, is
not used.
"""

import contextlib
import http.client
import json
import math
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any

from loadtest.options import Options
from loadtest.problems import clean
from loadtest.target import Identity, Target, request_method

READ_SIZE = 65_536
IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"))  # RFC 9110 section 9.2.2
BACKEND_HEADER, BACKEND_FIELD = "X-Served-By", "server_id"
GLANCE = 2.0  # seconds to find out what is spoken at a port
MAX_NAME = 200  # characters of a backend's name
CONNECT = frozenset(("connect timeout", "connect refused", "connect failed"))  # reasons: nothing was sent
clock = time.perf_counter
Json = dict[str, Any]


@dataclass(slots=True)
class Sample:
    """One request. Times are values of `clock`, 0 for what did not happen; `reason` is None if all went well."""

    due: float = 0.0  # when it was meant to be sent
    begin: float = 0.0  # when that was begun
    first_byte: float = 0.0  # when the head of the answer was complete
    end: float = 0.0
    connect: float = 0.0  # seconds to connect
    status: int | None = None
    backend: str | None = None
    reason: str | None = None
    detail: str = ""
    size: int = 0
    headers: http.client.HTTPMessage | None = None


class Failed(Exception):
    """Why there is no connection, or no good answer."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def failure(error: Exception, timeout: float) -> tuple[str, str]:
    """The kind of failure that an exception stands for, and its detail."""
    match error:
        case Failed():
            return error.reason, error.detail
        case TimeoutError():
            return "timeout", f"after {timeout:g} s"
        case http.client.RemoteDisconnected():
            return "closed", "without an answer"
        case ConnectionError():
            return "reset", "by the other side"
        case http.client.IncompleteRead():
            return "bad body", "incomplete"
        case http.client.HTTPException():
            return "bad answer", "malformed"
        case _:
            return "failed", clean(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def explain(error: Exception, timeout: float) -> str:
    return ", ".join(filter(None, failure(error, timeout)))


def open_socket(target: Target, connect_timeout: float, timeout: float) -> socket.socket:
    """A connected socket; `timeout` then limits each wait on it. Raises Failed with a reason of CONNECT."""
    try:
        sock = socket.create_connection((target.host, target.port), connect_timeout)
    except TimeoutError:
        raise Failed("connect timeout", f"after {connect_timeout:g} s") from None
    except ConnectionRefusedError:
        raise Failed("connect refused") from None
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA does not know
        raise Failed("connect failed", clean(getattr(error, "strerror", None) or str(error))) from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.tls:
            sock = target.tls.wrap_socket(sock, server_hostname=target.host)
        sock.settimeout(timeout)
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise Failed(
            "connect failed", f"{error.verify_message}; SSL_CERT_FILE names a CA to trust, -k takes any"
        ) from None
    except OSError as error:
        sock.close()
        raise Failed("connect failed", clean(getattr(error, "reason", None) or str(error))) from None
    return sock


def other_scheme(target: Target) -> str:
    """A question for whoever has written http where TLS is spoken, or the other way round; empty if neither is so."""
    try:
        with socket.create_connection((target.host, target.port), GLANCE) as sock:
            if target.tls:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return "is it http://?" if sock.recv(5) == b"HTTP/" else ""
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(sock, server_hostname=target.host):
                return "is it https://?"
    except (OSError, UnicodeError):
        return ""


def read_head(sock: socket.socket, method: str) -> http.client.HTTPResponse:
    """The answer, its head read. Interim ones before it are none (RFC 9110 section 15.2); of 101, which nobody has
    asked for, there is nothing after it."""
    response = http.client.HTTPResponse(sock, method=method)
    response.begin()
    while 101 < response.status < 200:  # 100 it passes over by itself
        response.headers = None  # type: ignore[assignment]  # what makes it begin again
        response.begin()
    return response


class Connection:
    """Opened when needed and kept between requests. One thread uses it at a time; `cut` may come from any."""

    def __init__(self, options: Options, target: Target) -> None:
        self._target = target
        self._method = request_method(options)
        self._connect_timeout, self._timeout = options.connect_timeout, options.timeout
        self._expected = options.expect_status
        self._header = options.backend_header or BACKEND_HEADER
        self._field = options.backend_field
        self._socket: socket.socket | None = None
        self._cut: str | None = None
        self.deadline = math.inf  # when the answer under way must have come
        self.stale_retries = 0

    def exchange(self, identity: Identity, due: float | None = None) -> Sample:
        """Send the identity's request and read the whole answer. Never raises for what the network does."""
        self._cut = None
        begin = clock()
        sample = Sample(due=begin if due is None else due, begin=begin)
        self.deadline = begin + self._connect_timeout + self._timeout
        try:
            self._read(self._ask(identity, sample), identity, sample)
        except (OSError, http.client.HTTPException, Failed) as error:
            sample.reason, sample.detail = failure(error, self._timeout)
            self.close()
        self.deadline = math.inf
        sample.end = clock()
        if self._cut:
            sample.reason, sample.detail = self._cut, f"after {self._timeout:g} s" if self._cut == "timeout" else ""
            self.close()
        return sample

    def cut(self, why: str) -> None:
        """From another thread: end the exchange under way. Closing would not wake its thread, shutting down does."""
        self._cut = why
        if sock := self._socket:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's, which would race the reader

    def close(self) -> None:
        if sock := self._socket:
            self._socket = None
            sock.close()

    def _ask(self, identity: Identity, sample: Sample) -> http.client.HTTPResponse:
        reused = self._socket is not None
        try:
            return self._send(identity, sample)
        except ConnectionError:
            # A kept connection may be closed by the other side at any time; only then is sending again no fault.
            if not reused or self._cut or self._method not in IDEMPOTENT:
                raise
            self.stale_retries += 1
            self.close()
            return self._send(identity, sample)

    def _send(self, identity: Identity, sample: Sample) -> http.client.HTTPResponse:
        if self._socket is None:
            started = clock()
            self._socket = open_socket(self._target, self._connect_timeout, self._timeout)
            sample.connect = clock() - started
        self.deadline = clock() + self._timeout
        self._socket.sendall(identity.request)
        return read_head(self._socket, self._method)

    def _read(self, response: http.client.HTTPResponse, identity: Identity, sample: Sample) -> None:
        sample.first_byte = clock()
        sample.status, sample.headers, start = response.status, response.headers, b""
        sample.backend = response.headers.get(self._header)
        if identity.keeps_cookies and (lines := response.headers.get_all("Set-Cookie")):
            identity.remember(lines)
        while piece := response.read(READ_SIZE):
            start = start or piece
            sample.size += len(piece)
        if response.length:  # read(n) returns short when the connection ends too early
            raise http.client.IncompleteRead(b"", response.length)
        if response.status < 200:
            raise Failed("bad answer", f"status {response.status}")
        if self._field or not sample.backend:
            name = json_object(start).get(self._field or BACKEND_FIELD)
            sample.backend = sample.backend if name is None else str(name)[:MAX_NAME]
        if (response.status >= 400) if self._expected is None else (response.status not in self._expected):
            sample.reason, sample.detail = "bad status", str(response.status)
        if response.will_close:
            self.close()


def json_object(body: bytes) -> Json:
    """The JSON object in these bytes, empty for anything else."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}

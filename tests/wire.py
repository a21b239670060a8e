"""Bytes on the wire, strictly: a backend that says exactly what it is told, and a client that reads frames."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn, Self

from support import PATIENCE, RawRequest, Served, connect, get, ok, wait_until

Line = tuple[bytes, bytes]
Script = Callable[[socket.socket, RawRequest], None]
CHUNKED_ABC = b"3\r\nabc\r\n0\r\n\r\n"
HEAD_OK = b"HTTP/1.1 200 OK\r\n"
MIB = 1024 * 1024


class Broken(Exception):
    """The message ended before its end, or its framing is malformed."""


class WireBackend:
    """Accepts connections and answers each request by `script`, until that raises OSError or hangs up.

    Health checks (`GET /health`) are answered 200 unless `is_healthy` is False. `requests` holds all other complete
    requests, `broken` the rest; `peers` has the connection of each complete one. `on_head`, if set, is called before
    the body is read; when it returns True the connection is left to it. With a `path` it listens on a Unix socket.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.script: Script = lambda sock, request: sock.sendall(ok())
        self.on_head: Callable[[socket.socket, RawRequest], bool] | None = None
        self.is_healthy = True
        self.requests: list[RawRequest] = []
        self.broken: list[RawRequest] = []
        self.peers: list[int] = []
        self.open: set[socket.socket] = set()
        self.used: set[socket.socket] = set()  # those that carried a request
        self.streams: dict[socket.socket, IO[bytes]] = {}  # for an `on_head` that reads the body itself
        self.port = 0
        self.listen()
        self.url = f"http://127.0.0.1:{self.port}" if path is None else f"http+unix://{path}"

    def listen(self) -> None:
        """On a free port; again on the same one after `close`."""
        if self.path is None:
            self.listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
            self.port = self.listener.getsockname()[1]
        else:
            self.path.unlink(missing_ok=True)
            self.listener = socket.create_server(str(self.path), family=socket.AF_UNIX, backlog=1024)
        self._thread = threading.Thread(target=self._accept, name="scripted-backend", daemon=True)
        self._thread.start()

    def answer(self, data: bytes, close: bool = False) -> None:
        """Answer every request with these bytes."""

        def script(sock: socket.socket, request: RawRequest) -> None:
            sock.sendall(data)
            if close:
                sock.shutdown(socket.SHUT_RDWR)

        self.script = script

    def hold(self) -> threading.Event:
        """Its answers, which say what was asked for, come when this is set."""
        go = threading.Event()
        self.script = lambda sock, request: (go.wait(60), sock.sendall(ok(request.target)))
        return go

    def stall(self, data: bytes = b"") -> threading.Semaphore:
        """It answers with this and no more. Counts the connections that are closed to it."""
        closed = threading.Semaphore(0)

        def script(sock: socket.socket, request: RawRequest) -> None:
            sock.sendall(data)
            if wait_closed(sock):
                closed.release()

        self.script = script
        return closed

    def reset(self) -> None:
        self.is_healthy = True
        self.on_head = None
        self.answer(ok())
        self.drop_connections()
        for seen in (self.requests, self.broken, self.peers):
            seen.clear()

    def drop_connections(self) -> None:
        """End every connection that carried a request, so that the next one comes on a fresh connection."""
        dropped = set(self.used)
        for sock in dropped:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: not dropped.intersection(self.used), what="connections of the last test are closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which close alone does not
        self.listener.close()
        for sock in list(self.open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)

    @property
    def seen(self) -> int:
        """Requests of which anything came."""
        return len(self.requests) + len(self.broken)

    def _accept(self) -> None:
        listener = self.listener
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            self.open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), name="scripted-connection", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rb") as stream, suppress(OSError):
                self.streams[sock] = stream
                while self._serve_one(sock, stream):
                    pass
        finally:
            self.streams.pop(sock, None)
            self.used.discard(sock)
            self.open.discard(sock)

    def _serve_one(self, sock: socket.socket, stream: IO[bytes]) -> bool:
        head = _read_head(stream)
        if not head:
            return False
        request = RawRequest(head, b"")
        if request.target == b"/health":
            status = b"200 OK" if self.is_healthy else b"500 Internal Server Error"
            sock.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            return True
        self.used.add(sock)
        if self.on_head is not None and self.on_head(sock, request):
            return False
        try:
            request.body = _read_request_body(stream, request)
        except (Broken, OSError):
            self.broken.append(request)
            return False
        self.peers.append(sock.getpeername()[1] if self.path is None else 0)
        self.requests.append(request)
        self.script(sock, request)
        return True


def _read_head(stream: IO[bytes]) -> bytes:
    """The bytes up to and with the empty line; b"" at EOF."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
    return head


def _read_request_body(stream: IO[bytes], request: RawRequest) -> bytes:
    codings, lengths = request.values(b"transfer-encoding"), request.values(b"content-length")
    if len(codings) + len(lengths) > 1:
        raise Broken(f"framed twice: {request.head!r}")
    if codings:
        return read_chunks(stream)
    return _exactly(stream, int(lengths[0])) if lengths else b""


def read_chunks(stream: IO[bytes]) -> bytes:
    """A chunked body up to its last chunk. Raises Broken if it does not come."""
    body = b""
    while True:
        line = stream.readline()
        if not line.endswith(b"\r\n"):
            raise Broken("no chunk size")
        size = int(line, 16)
        body += _exactly(stream, size)
        if _exactly(stream, 2) != b"\r\n":
            raise Broken("no line end after a chunk")
        if not size:
            return body


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Broken(f"{len(data)} of {size} bytes")
    return data


def read_response(stream: IO[bytes], method: bytes = b"GET") -> tuple[int, list[Line], bytes]:
    """One response by its own framing, interim ones skipped. Raises Broken if it is not complete."""
    while True:
        head = _read_head(stream)
        if not head:
            raise Broken("no response")
        first, *rest = head[:-4].split(b"\r\n")
        status = int(first.split(b" ")[1])
        if status >= 200:
            break
    lines = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in rest)]
    return status, lines, _read_response_body(stream, status, lines, method)


def _read_response_body(stream: IO[bytes], status: int, lines: list[Line], method: bytes) -> bytes:
    if method == b"HEAD" or status in (204, 304):
        return b""
    if values(lines, b"transfer-encoding"):
        return read_chunks(stream)
    lengths = values(lines, b"content-length")
    return _exactly(stream, int(lengths[0])) if lengths else stream.read()


def values(lines: list[Line], name: bytes) -> list[bytes]:
    return [value for key, value in lines if key == name]


def request(
    target: bytes = b"/", *lines: bytes, method: bytes = b"GET", body: bytes = b"", version: bytes = b"1.1"
) -> bytes:
    """A request that leaves the connection open; framing is the caller's."""
    return b"\r\n".join([b"%s %s HTTP/%s" % (method, target, version), b"Host: test", *lines]) + b"\r\n\r\n" + body


def post(*lines: bytes, body: bytes = b"", target: bytes = b"/") -> bytes:
    return request(target, *lines, method=b"POST", body=body)


LARGE = b"x" * 70_000


def large(target: bytes) -> bytes:
    """A request that holds a thread while its backend works; those on the express way hold none."""
    return get(target, b"Content-Length: %d" % len(LARGE), method=b"PUT") + LARGE


def ask(port: int, data: bytes, method: bytes = b"GET") -> tuple[int, list[Line], bytes]:
    """One request, one complete response."""
    with connect(port) as sock, sock.makefile("rb") as stream:
        sock.sendall(data)
        return read_response(stream, method)


def forwarded(balancer: Served, backend: WireBackend, *lines: bytes, target: bytes = b"/") -> RawRequest:
    """The request as the backend got it."""
    assert ask(balancer.port, request(target, *lines))[0] == 200
    return backend.requests[-1]


def returned(balancer: Served, backend: WireBackend, *lines: bytes) -> list[Line]:
    """The header lines of an answer as the client got them."""
    backend.answer(ok(b"ok", *lines))
    return ask(balancer.port, request())[1]


def hang_up(sock: socket.socket, *, reset: bool = False) -> NoReturn:
    """For scripts: end the connection here, with FIN or with RST."""
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionAbortedError("the script hangs up")


def wait_closed(sock: socket.socket, timeout: float = PATIENCE) -> bool:
    """True when the other side has closed; False if it still sends or `timeout` has passed."""
    sock.settimeout(timeout)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def resident_bytes(pid: int, field: str = "VmRSS") -> int:
    """Memory of a process: `VmRSS` now, `VmHWM` at its highest."""
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines[field].split()[0]) * 1024

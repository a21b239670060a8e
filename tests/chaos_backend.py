"""A backend for the chaos suite, a process of its own: `python chaos_backend.py PORT LOG`.

Its answers carry a checksum of the request, so that no wrong body passes for a right one. What it executes it writes to
LOG before it answers, one `METHOD KEY` a line in one append, which survives kill -9. `POST /fault` makes it misbehave.
Over a WebSocket it sends back what comes, and closes after GOOD_BYE. Standard library alone: it starts in a tenth of a
second.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import parse_qs, urlsplit

GARBAGE = (
    b"\0\xff\x16\x03\x01 this is no HTTP\r\n\r\n",
    b"HTTP/1.1 two hundred OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
)

PIECE = 65536  # bytes of an answer per write
TEXT, CLOSE, PING, PONG = 0x81, 0x88, 0x89, 0x8A  # first bytes of frames (RFC 6455 section 5.2)
GOOD_BYE = b"good bye"
SWITCH = b"HTTP/1.1 101 On\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\n"


def checksum(method: str, target: str, body: bytes) -> str:
    return hashlib.sha256(f"{method} {target}\n".encode() + body).hexdigest()


def answer_body(digest: str, size: int) -> bytes:
    """`size` bytes that belong to this request alone."""
    line = f"{digest}\n".encode()
    return (line * (size // len(line) + 1))[:size]


def key_of(target: str) -> str:
    return urlsplit(target).path.strip("/")


@dataclass
class Fault:
    """For every `every`-th request: none, slow, garbage, reset_head, reset_body, end_body or hang."""

    kind: str = "none"
    every: int = 1
    seconds: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)


class Hangup(Exception):
    """Ends the connection, `reset` with RST."""

    def __init__(self, reset: bool = False) -> None:
        self.reset = reset


class Backend:
    def __init__(self, port: int, log: str) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self._fault = Fault()
        self._lock = threading.Lock()  # guards `_served`
        self._served = 0

    def run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            threading.Thread(target=self._connection, args=(sock,), daemon=True).start()

    def _connection(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock, sock.makefile("rb") as stream, suppress(OSError):
            try:
                while self._one(sock, stream):
                    pass
            except Hangup as end:
                if end.reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _one(self, sock: socket.socket, stream: IO[bytes]) -> bool:
        """Serve one request. False at the end of the connection; a request that broke off is not executed."""
        first, fields = read_head(stream)
        if not first:
            return False
        body = read_body(stream, fields)
        if body is None:
            return False
        method, target, _ = first.split(" ")
        if target == "/health":
            sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            return False
        if target == "/fault":
            self._fault.over.set()
            self._fault = Fault(**json.loads(body))
            sock.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            return False
        os.write(self._log, f"{method} {key_of(target)}\n".encode())
        with self._lock:
            self._served += 1
            served, fault = self._served, self._fault
        kind = fault.kind if served % fault.every == 0 else "none"
        misbehave(sock, kind, fault, served)
        if "sec-websocket-key" in fields:
            sock.sendall(SWITCH % accept_of(fields["sec-websocket-key"]))
            self._echo(sock, stream, kind)
            return False
        self._answer(sock, method, target, body, kind)
        return True

    def _answer(self, sock: socket.socket, method: str, target: str, body: bytes, kind: str) -> None:
        query = parse_qs(urlsplit(target).query)
        size, is_chunked = int(query["size"][0]), "chunked" in query
        digest = checksum(method, target, body)
        head = f"HTTP/1.1 200 OK\r\nX-Digest: {digest}\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n" if is_chunked else f"Content-Length: {size}\r\n\r\n"
        data = b"" if method == "HEAD" else frame(answer_body(digest, size), is_chunked)
        send(sock, head.encode(), data, kind)

    def _echo(self, sock: socket.socket, stream: IO[bytes], kind: str) -> None:
        while (got := read_frame(stream)) is not None and got[0] != CLOSE:
            first, data = got
            if (first, data) == (TEXT, GOOD_BYE):
                sock.sendall(make_frame(CLOSE, (1000).to_bytes(2, "big")))
            else:
                send(sock, b"", make_frame(PONG if first == PING else first, data), kind)


def send(sock: socket.socket, head: bytes, data: bytes, kind: str) -> None:
    """Half of the data, if that is what goes wrong."""
    if kind in ("reset_body", "end_body"):
        sock.sendall(head + data[: len(data) // 2])
        raise Hangup(reset=kind == "reset_body")
    sock.sendall(head + data)


def misbehave(sock: socket.socket, kind: str, fault: Fault, served: int) -> None:
    """What goes wrong before the head; raises Hangup where that is the end."""
    if kind == "slow":
        fault.over.wait(fault.seconds)
    elif kind == "garbage":
        sock.sendall(GARBAGE[served // fault.every % len(GARBAGE)])
        raise Hangup
    elif kind == "reset_head":
        raise Hangup(reset=True)
    elif kind == "hang":
        fault.over.wait()
        raise Hangup


def frame(body: bytes, is_chunked: bool) -> bytes:
    if not is_chunked:
        return body
    pieces = [body[at : at + PIECE] for at in range(0, len(body), PIECE)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def accept_of(key: str) -> bytes:
    return base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest())


def make_frame(first: int, data: bytes) -> bytes:
    size = len(data)
    if size < 126:
        return bytes([first, size]) + data
    return bytes([first, 126 if size < 65536 else 127]) + size.to_bytes(2 if size < 65536 else 8, "big") + data


def read_frame(stream: IO[bytes]) -> tuple[int, bytes] | None:
    """(first byte, unmasked payload); None if none came whole."""
    head = stream.read(2)
    if len(head) < 2:
        return None
    size = head[1] & 127
    if size > 125:
        size = int.from_bytes(stream.read(2 if size == 126 else 8), "big")
    mask, data = stream.read(4), stream.read(size)
    if len(data) < size:
        return None
    masks = (mask * (size // 4 + 1))[:size]
    return head[0], (int.from_bytes(data, "big") ^ int.from_bytes(masks, "big")).to_bytes(size, "big")


def read_head(stream: IO[bytes]) -> tuple[str, dict[str, str]]:
    """(request line, header lines by lower-case name); ("", {}) if none came whole."""
    lines: list[str] = []
    while line := stream.readline():
        if line == b"\r\n":
            pairs = [text.partition(":") for text in lines[1:]]
            return lines[0], {name.lower(): value.strip() for name, _, value in pairs}
        lines.append(line.decode("latin-1").rstrip("\r\n"))
    return "", {}


def read_body(stream: IO[bytes], fields: dict[str, str]) -> bytes | None:
    """None if it broke off."""
    if "transfer-encoding" not in fields:
        size = int(fields.get("content-length", 0))
        body = stream.read(size)
        return body if len(body) == size else None
    pieces: list[bytes] = []
    while (line := stream.readline()).endswith(b"\r\n"):
        size = int(line, 16)
        piece = stream.read(size + 2)
        if len(piece) < size + 2:
            return None
        if not size:
            return b"".join(pieces)
        pieces.append(piece[:-2])
    return None


if __name__ == "__main__":
    Backend(int(sys.argv[1]), sys.argv[2]).run()

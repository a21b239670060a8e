"""256 MiB up and down through the balancer: nothing changed, and memory stays flat."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support import BalancerProcess, connect, wait_until
from wire import WireBackend, read_response, request, resident_bytes, values

MIB = 1024 * 1024
SIZE = 256 * MIB
ROOM = 32 * MIB  # what the process may grow by
PIECE = bytes(range(256)) * 256  # 64 KiB


@pytest.fixture(scope="module")
def backend_of_size() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


@pytest.fixture
def sized(backend_of_size: WireBackend) -> WireBackend:
    backend_of_size.reset()
    return backend_of_size


@pytest.fixture
def fresh_balancer(sized: WireBackend) -> Iterator[BalancerProcess]:
    """A process of its own for each test: its highest memory use is then that of the test."""
    with BalancerProcess(f"--backend=only={sized.url}") as balancer:
        yield balancer


def content() -> Iterator[bytes]:
    """SIZE bytes, each piece different from the last, so that a lost or repeated one is seen."""
    for number in range(SIZE // len(PIECE)):
        yield number.to_bytes(8, "big") + PIECE[8:]


def digest_of_content() -> str:
    digest = hashlib.sha256()
    for piece in content():
        digest.update(piece)
    return digest.hexdigest()


def framed(chunked: bool) -> Iterator[bytes]:
    for piece in content():
        yield b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece
    if chunked:
        yield b"0\r\n\r\n"


def framing(chunked: bool) -> bytes:
    return b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % SIZE


def digest_of_body(stream: Any, chunked: bool) -> str:
    """Reads as much as is framed; raises ValueError if the framing breaks."""
    digest = hashlib.sha256()
    left = SIZE
    while left:
        if chunked:
            left = int(stream.readline(), 16)
        size = left if chunked else min(left, len(PIECE))
        data = stream.read(size)
        if len(data) < size:
            raise ValueError("the body ended early")
        digest.update(data)
        if chunked:
            stream.readline()
        else:
            left -= size
    return digest.hexdigest()


def assert_flat(balancer: BalancerProcess, before: int) -> None:
    grown = resident_bytes(balancer.pid, "VmHWM") - before
    assert grown < ROOM, f"grew by {grown / MIB:.1f} MiB"


@pytest.mark.parametrize("chunked", [False, True])
def test_download(fresh_balancer: BalancerProcess, sized: WireBackend, chunked: bool) -> None:
    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\n" + framing(chunked) + b"\r\n\r\n")
        for piece in framed(chunked):
            sock.sendall(piece)

    sized.script = script
    before = resident_bytes(fresh_balancer.pid)
    with connect(fresh_balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        head = b"".join(iter(stream.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200 ") and framing(chunked).lower() in head
        assert digest_of_body(stream, chunked) == digest_of_content()
    assert_flat(fresh_balancer, before)


@pytest.mark.parametrize("chunked", [False, True])
def test_upload(fresh_balancer: BalancerProcess, sized: WireBackend, chunked: bool) -> None:
    """The backend hashes the body as it comes: 256 MiB kept by the test would only cost the machine."""
    received: list[str] = []

    def on_head(sock: socket.socket, got: Any) -> bool:
        assert [value for name, value in got.lines if name == b"content-length"] == ([] if chunked else [b"%d" % SIZE])
        received.append(digest_of_body(sized.streams[sock], chunked))
        sock.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        return True

    sized.on_head = on_head
    before = resident_bytes(fresh_balancer.pid)
    with connect(fresh_balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/", framing(chunked), method=b"POST"))
        for piece in framed(chunked):
            sock.sendall(piece)
        status, lines, _ = read_response(stream)
    assert (status, values(lines, b"content-length")) == (204, [])
    assert received == [digest_of_content()]
    assert_flat(fresh_balancer, before)
    wait_until(lambda: fresh_balancer.status()["statistics"]["active_requests"] == 0)

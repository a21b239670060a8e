"""WebSockets between a backend and a client, one of which says anything: handshakes and frames with a flaw.

The other one gets what a strict reader takes for WebSocket (websockets' own), to a proper end; the balancer has no
traceback, records each, and goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from fuzzing import SEED, fuzzing, mutations, patient
from fuzzing import replay as replay
from hypothesis import given, seed
from hypothesis import strategies as st
from support import BalancerProcess, RawRequest, connect, read_all, wait_until
from test_websocket import CLOSE_1000, HANDSHAKE, frame, read_to_close, switch
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import Protocol, Side
from wire import WireBackend, hang_up

from balancer.protocol.websocket import accept_of, is_close_code

pytestmark = patient

HEAD = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %A\r\n"
    b"Sec-WebSocket-Protocol: chat\r\n\r\n"
)
OFFER = HANDSHAKE[:-2] + b"Sec-WebSocket-Protocol: other, chat\r\n\r\n"
HEAD_PIECES = [
    *(b"\r", b"\n", b"\r\n", b"\x00", b"99", b"1000", b"200", b"HTTP/1.0", b"Content-Length: 3\r\n", b", chat", b"h2c"),
    *(b"Sec-WebSocket-Extensions: permessage-deflate\r\n", b"Transfer-Encoding: chunked\r\n", b"%A", b"\xff"),
]
SIZES = [0, 1, 125, 126, 65535, 65536]


def frames(*, mask: bool) -> list[bytes]:
    def made(opcode: Opcode, data: bytes = b"", fin: bool = True) -> bytes:
        return frame(opcode, data, fin, mask)

    snow = "\N{SNOWMAN}".encode()
    pieces = made(Opcode.TEXT, snow[:2], False) + made(Opcode.PING, b"x") + made(Opcode.CONT, snow[2:])
    return [*(made(Opcode.BINARY, b"x" * size) for size in SIZES), pieces, made(Opcode.CLOSE, b"\x0f\xa1" + snow)]


GOOD = {side: [b"".join(frames(mask=side)), *frames(mask=side)] for side in (False, True)}
FRAME_PIECES = [
    *(
        b"\x88\x00",
        b"\x88\x02\x03\xe8",
        b"\x88\x02\x03\xed",
        b"\x89\x7e\xff\xff",
        b"\x80\x00",
        b"\x01\x00",
        b"\xc1\x00",
    ),
    *(b"\x82\x7f" + b"\xff" * 8, b"\x82\x7f" + b"\x00" * 4 + b"\x01\x00\x00\x01", b"\x81\x01\xff", b"\x83\x00"),
]


@pytest.fixture(scope="module")
def scripted_balancer(scripted: WireBackend) -> Iterator[BalancerProcess]:
    limits = ["--response-timeout=5", "--health-timeout=10", "--health-fall=10", "--eject-after=0", "--retries=0"]
    with BalancerProcess(f"--backend=only={scripted.url}", *limits) as balancer:
        yield balancer
        wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0, "each was recorded")
        assert balancer.status()["statistics"]["websockets"] == 0
        assert not any("Traceback" in line for line in balancer.lines)


def check_frames(data: bytes, side: Side) -> None:
    """It is WebSocket, as far as it goes; from us to a client, with an end."""
    reader = Protocol(side, max_size=None)
    reader.receive_data(data)
    assert reader.parser_exc is None, reader.parser_exc
    if reader.close_rcvd is not None:
        assert is_close_code(reader.close_rcvd.code) or reader.close_rcvd == Close(1005, "")
    for event in reader.events_received():
        assert isinstance(event, Frame)
        if event.opcode is Opcode.TEXT:
            bytes(event.data).decode()


def check_answer(data: bytes) -> None:
    head, _, rest = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    if status == 101:
        check_frames(rest, Side.CLIENT)
        assert b"\x88" in rest, "no close frame"
    else:
        assert 200 <= status <= 599


def hostile(scripted: WireBackend, balancer: BalancerProcess, head: bytes, data: bytes) -> None:
    def script(sock: socket.socket, request: RawRequest) -> None:
        with suppress(OSError):
            sock.sendall(head.replace(b"%A", accept_of(request.values(b"sec-websocket-key")[0])) + data)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        hang_up(sock)

    scripted.script = script
    with connect(balancer.port) as client:
        client.sendall(OFFER)
        client.settimeout(30)
        check_answer(read_answer(client))


def read_answer(client: socket.socket) -> bytes:
    """Until the end of what was switched to; another answer leaves the connection open."""
    data = b""
    while not (b"\r\n\r\n" in data and b" 101 " not in data[:16]) and (piece := client.recv(1 << 20)):
        data += piece
    return data


@seed(SEED)
@fuzzing
@given(data=mutations(GOOD[False], FRAME_PIECES))
def test_frames_of_a_hostile_backend(scripted: WireBackend, scripted_balancer: BalancerProcess, data: bytes) -> None:
    hostile(scripted, scripted_balancer, HEAD, data)


@seed(SEED)
@fuzzing
@given(head=mutations([HEAD], HEAD_PIECES))
def test_handshakes_of_a_hostile_backend(
    scripted: WireBackend, scripted_balancer: BalancerProcess, head: bytes
) -> None:
    hostile(scripted, scripted_balancer, head, CLOSE_1000)


@seed(SEED)
@fuzzing
@given(data=mutations(GOOD[True], FRAME_PIECES), is_at_once=st.booleans())
def test_frames_of_a_hostile_client(
    scripted: WireBackend, scripted_balancer: BalancerProcess, data: bytes, is_at_once: bool
) -> None:
    """`is_at_once`: before it was let in."""
    seen: list[bytes] = []

    def script(sock: socket.socket, request: RawRequest) -> None:
        switch(sock, request)
        seen.append(read_to_close(sock))
        hang_up(sock)

    scripted.script = script
    with connect(scripted_balancer.port) as client:
        client.sendall(HANDSHAKE + (data if is_at_once else b""))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 101")
        with suppress(OSError):  # it was cut off
            client.sendall(b"" if is_at_once else data)
            client.shutdown(socket.SHUT_WR)
            read_all(client)
    wait_until(lambda: seen, "the backend was told")
    check_frames(seen[0], Side.SERVER)

"""WebSockets through the balancer, with real clients and a real backend."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from certificates import Files
from support import (
    PATIENCE,
    PYTHON,
    Balancer,
    BalancerProcess,
    Process,
    RawRequest,
    Served,
    fetch,
    fetch_json,
    newest,
    read_all,
    wait_until,
)
from support import connect as connect_raw
from websockets.asyncio.client import connect as asyncio_connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Protocol, Side
from websockets.sync.client import ClientConnection, connect, unix_connect
from websockets.sync.server import Server, ServerConnection, serve, unix_serve
from wire import MIB, WireBackend, hang_up, resident_bytes

from balancer.edge import port, websocket
from balancer.edge.sockets import Sockets
from balancer.forwarding.answer import Answer, whole
from balancer.forwarding.filter import Filter
from balancer.loadbalancer import LoadBalancer
from balancer.protocol.request import Request as RequestSeen
from balancer.protocol.websocket import accept_of


class Echo:
    """A backend that sends back what it gets, and closes when asked to: `close CODE REASON`."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.closes: list[tuple[int | None, str]] = []
        self.requests: list[Request] = []
        self._server: Server = serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._process,
            subprotocols=["chat", "other"],  # type: ignore[list-item]
            select_subprotocol=lambda connection, offered: next((each for each in offered if each == "chat"), None),
            max_size=None,
            compression=None,
            ssl=tls,
        )
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="echo")
        self._thread.start()

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/health":
            return connection.respond(HTTPStatus.OK, "")
        self.requests.append(request)
        return connection.respond(HTTPStatus.UNAUTHORIZED, "who?\n") if request.path == "/secret" else None

    def _handle(self, connection: ServerConnection) -> None:
        try:
            for message in connection:
                if isinstance(message, str) and message.startswith("close "):
                    _, code, reason = message.split(" ", 2)
                    connection.close(int(code), reason)
                connection.send(message)
        except ConnectionClosed:
            pass
        finally:
            self.closes.append((connection.close_code, connection.close_reason or ""))

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    started = Echo()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def balancer(echo: Echo) -> Iterator[Balancer]:
    with Balancer(f"--backend=only={echo.url}") as started:
        yield started


def ws(balancer: Served, path: str = "/x") -> str:
    return balancer.url.replace("http", "ws", 1) + path


@contextmanager
def opened(balancer: Served, path: str = "/x", **options: Any) -> Iterator[ClientConnection]:
    with connect(ws(balancer, path), max_size=None, **options) as client:
        yield client


def end_of(client: ClientConnection) -> tuple[int | None, str | None]:
    """By which code it is closed, and why."""
    with pytest.raises(ConnectionClosed):
        client.recv()
    return client.close_code, client.close_reason


def test_messages_pass_both_ways_as_they_are(balancer: Balancer) -> None:
    messages = ["text", "", b"", b"\x00\xff", "\N{SNOWMAN}" * 1000, b"x" * 1_000_000]
    with opened(balancer) as client:
        for message in messages:
            client.send(message)
        client.send(["in ", "three ", "fragments"])
        assert [client.recv() for _ in [*messages, ...]] == [*messages, "in three fragments"]


def test_the_backend_gets_a_handshake_of_our_own(balancer: Balancer, echo: Echo) -> None:
    headers = {"X-Forwarded-For": "1.2.3.4", "X-Request-ID": "mine", "Cookie": "a=1"}
    asking = {"subprotocols": ["nope", "chat"], "origin": "http://a.example", "additional_headers": headers}
    with opened(balancer, "/chat?room=1", **asking) as client:
        assert client.subprotocol == "chat"
        assert client.response is not None and "Sec-WebSocket-Extensions" not in client.response.headers
        assert client.request is not None
        asked, seen = client.request.headers, echo.requests[-1].headers
    assert echo.requests[-1].path == "/chat?room=1"
    assert (seen["Host"], seen["Cookie"], seen["Origin"]) == (asked["Host"], "a=1", "http://a.example")
    assert seen["Sec-WebSocket-Key"] != asked["Sec-WebSocket-Key"]
    assert seen["Sec-WebSocket-Protocol"] == "nope, chat"
    assert asked["Sec-WebSocket-Extensions"] and "Sec-WebSocket-Extensions" not in seen
    assert (seen["X-Forwarded-For"], seen["X-Forwarded-Proto"], seen["X-Request-ID"]) == ("127.0.0.1", "http", "mine")
    assert "load" not in seen["Via"] and seen["Connection"] == "Upgrade"


def test_a_refusal_of_the_backend_goes_to_the_client_as_it_is(balancer: Balancer) -> None:
    with pytest.raises(InvalidStatus) as caught, opened(balancer, "/secret"):
        pass
    response = caught.value.response
    assert (response.status_code, response.body) == (401, b"who?\n")
    assert response.headers["X-Request-ID"] == newest(balancer)["request_id"]


class Nobody(Filter):
    """Nor does its answer wait for a backend."""

    def admit(self, request: RequestSeen) -> Answer | None:
        return whole(403, b"not you\n", (b"x-why", b"because")) if request.path == "/closed" else None


def test_a_refusal_of_a_filter_is_an_answer_like_any_other(echo: Echo) -> None:
    upgrade = (
        "Connection: Upgrade|Upgrade: websocket|Sec-WebSocket-Version: 13|Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="
    )
    lines = [argument for line in upgrade.split("|") for argument in ("-H", line)]
    with LoadBalancer([f"only={echo.url}"], filters=[Nobody()]) as balancer:
        wait_until(balancer.pool.has_had_first_round)
        command = ["curl", "-si", "--http1.1", *lines, f"{balancer.url}/closed", f"{balancer.url}/secret"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    first, second = told.split("HTTP/1.1 ")[1:]  # on one connection
    assert first.startswith("403 ") and "x-why: because" in first and first.endswith("\n\nnot you\n")
    assert second.startswith("401 ") and second.endswith("\n\nwho?\n")


def test_close_codes_and_reasons_pass_both_ways_and_are_recorded(balancer: Balancer, echo: Echo) -> None:
    with opened(balancer) as client:
        client.send("close 4001 enough")
        assert end_of(client) == (4001, "enough")
    told = newest(balancer)["websocket"]
    assert (told["close_code"], told["closed_by"], told["messages_in"], told["messages_out"]) == (4001, "backend", 1, 0)
    with opened(balancer) as client:
        client.send("abc")
        client.recv()
        before = len(echo.closes)
        client.close(4444, "a reason, of which Granian does not tell")
    wait_until(lambda: len(echo.closes) > before)
    assert echo.closes[-1] == (4444, "")
    record = newest(balancer)
    assert (record["status"], record["complete"], record["reason"]) == (101, True, None)
    assert (record["bytes_in"], record["bytes_out"], record["server_id"]) == (3, 3, "only")
    assert (record["websocket"]["close_code"], record["websocket"]["closed_by"]) == (4444, "client")


def test_open_sockets_are_told_and_their_time_is_no_response_time(balancer: Balancer) -> None:
    with opened(balancer) as one, opened(balancer) as two:
        for client in (one, two):
            client.send("abc")
            client.recv()
        whole, only = balancer.status()["statistics"], balancer.backend("only")
        assert whole["websockets"] == only["websockets"] == only["active_connections"] == 2
        told = fetch(f"{balancer.url}/metrics")[2].decode()
        assert 'lb_backend_websockets{backend="only",pool="default"} 2.0' in told
        assert re.search(r'^lb_websocket_messages_total\{direction="in"\} [1-9]', told, re.M)
    record = newest(balancer)
    assert balancer.status()["statistics"]["websockets"] == 0
    assert record["response_time"] < record["websocket"]["seconds"]
    assert 'lb_websockets_closed_total{by="client",code="1000"}' in fetch(f"{balancer.url}/metrics")[2].decode()


def test_a_control_path_has_no_websocket_and_other_upgrades_are_plain_requests(balancer: Balancer) -> None:
    with pytest.raises(InvalidStatus, match="404"), opened(balancer, "/status"):
        pass
    assert fetch(f"{balancer.url}/", Connection="Upgrade", Upgrade="h2c")[0] == 426  # as the backend says


def test_a_client_behind_tls(echo: Echo, tmp_path: Path) -> None:
    files = Files(tmp_path)
    with Balancer(f"--backend=only={echo.url}", *files.flags, wait_ready=False) as balancer:
        wait_until(lambda: balancer.library.pool.has_had_first_round())
        context = ssl.create_default_context(cafile=files.certificate)

        async def converse() -> None:  # in one thread: Python 3.11's ssl is not safe with two, a reader and a writer
            async with asyncio_connect(ws(balancer), max_size=None, ssl=context) as client:
                await client.send(b"x" * 1_000_000)
                assert await client.recv() == b"x" * 1_000_000

        asyncio.run(converse())
    assert echo.requests[-1].headers["X-Forwarded-Proto"] == "https"


def test_a_backend_behind_tls(tmp_path: Path) -> None:
    """Frames that TLS keeps back, and large ones both ways at once, which it takes and gives in records of 16 KiB."""
    files = Files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    echo = Echo(context)
    messages = [b"x" * size for size in (0, 1, 16384, 16385, 100_000, 3_000_000)] * 3
    with (
        Balancer(f"--backend=only={echo.url}", f"--ca-file={files.certificate}") as balancer,
        opened(balancer) as client,
    ):
        sender = threading.Thread(target=lambda: [client.send(message) for message in messages])
        sender.start()
        assert [client.recv() for _ in messages] == messages
        sender.join()
    echo.stop()


def test_the_access_log_has_a_line_for_each_that_ended(echo: Echo) -> None:
    with BalancerProcess(f"--backend=only={echo.url}", "--access-log", "--access-log-format=json") as balancer:
        with opened(balancer) as client:
            client.send("abc")
            client.recv()
        line = json.loads(wait_until(lambda: [line for line in balancer.lines if '"websocket"' in line])[0])
    told = line["websocket"]
    assert (line["status"], line["bytes_in"], told["close_code"], told["closed_by"]) == (101, 3, 1000, "client")
    assert line["total"] < told["seconds"]


SOCKETS = 200


def test_sockets_need_no_threads(scripted: WireBackend) -> None:
    """Nor are they cut off as connections that nobody uses."""
    scripted.reset()
    flags = ["--header-timeout=1", "--thread-idle-timeout=0.2", "--websocket-ping-interval=0"]
    scripted.on_head = lambda sock, request: switch(sock, request) or bool(held.append(sock.dup())) or True
    held: list[socket.socket] = []
    with BalancerProcess(f"--backend=only={scripted.url}", *flags) as balancer, ExitStack() as stack:
        task = Path(f"/proc/{balancer.pid}/task")
        before = len(list(task.iterdir()))
        clients = []
        for _ in range(SOCKETS):
            clients.append(stack.enter_context(connect_raw(balancer.port)))
            clients[-1].sendall(HANDSHAKE)
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.1 101")
        ended = balancer.status()["now"] + 2
        wait_until(lambda: balancer.status()["now"] > ended)
        assert balancer.status()["statistics"]["websockets"] == SOCKETS
        assert len(list(task.iterdir())) <= before + 12
        balancer.popen.kill()
    for sock in held:
        sock.close()


# A backend that says what the test says.


def switch(sock: socket.socket, request: RawRequest, *lines: bytes, after: bytes = b"") -> None:
    accept = accept_of(request.values(b"sec-websocket-key")[0])
    head = [b"HTTP/1.1 101 Switching Protocols", b"Connection: Upgrade", b"Upgrade: websocket"]
    sock.sendall(b"\r\n".join([*head, b"Sec-WebSocket-Accept: " + accept, *lines]) + b"\r\n\r\n" + after)


def frame(opcode: Opcode, data: bytes = b"", fin: bool = True, mask: bool = False) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=mask)


@pytest.fixture
def wired(scripted: WireBackend) -> Iterator[Balancer]:
    scripted.reset()
    with Balancer(
        f"--backend=only={scripted.url}",
        "--retries=0",
        "--eject-after=0",
        "--websocket-max-message=1000",
        "--websocket-ping-interval=0",
    ) as started:
        yield started
    scripted.drop_connections()


@pytest.fixture
def wired_wide(scripted: WireBackend) -> Iterator[Balancer]:
    scripted.reset()
    with Balancer(f"--backend=only={scripted.url}", "--websocket-ping-interval=0") as started:
        yield started
    scripted.drop_connections()


GOOD = b"HTTP/1.1 101 Fine\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n"
BAD_SWITCHES = {
    "no upgrade": b"HTTP/1.1 101 Fine\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Fine\r\nConnection: upgrade\r\nUpgrade: h2c\r\nSec-WebSocket-Accept: %s\r\n\r\n",
    "wrong key": b"HTTP/1.1 101 Fine\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n",
    "extension": GOOD + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n",
    "body": GOOD + b"Content-Length: 0\r\n\r\n",
    "subprotocol not offered": GOOD + b"Sec-WebSocket-Protocol: b\r\n\r\n",
    "two subprotocols": GOOD + b"Sec-WebSocket-Protocol: a, a\r\n\r\n",
    "control character": GOOD + b"Sec-WebSocket-Protocol: a\x01\r\n\r\n",
    "bare line feed": GOOD + b"Sec-WebSocket-Protocol: a\nb: c\r\n\r\n",
    "folded": GOOD + b"Sec-WebSocket-Protocol: a\r\n b\r\n\r\n",
    "status 99": b"HTTP/1.1 099 x\r\nContent-Length: 0\r\n\r\n",
    "status 1000": b"HTTP/1.1 1000 x\r\nContent-Length: 0\r\n\r\n",
    "no http": b"SSH-2.0-x\r\n\r\n",
}


@pytest.mark.parametrize("answer", BAD_SWITCHES.values(), ids=BAD_SWITCHES)
def test_a_bad_answer_to_the_handshake_is_a_502(wired: Balancer, scripted: WireBackend, answer: bytes) -> None:
    def script(sock: socket.socket, request: RawRequest) -> None:
        accept = accept_of(request.values(b"sec-websocket-key")[0])
        sock.sendall(answer.replace(b"%s", accept))
        sock.shutdown(socket.SHUT_WR)

    scripted.script = script
    with pytest.raises(InvalidStatus, match="502"), opened(wired, subprotocols=["a"]):
        pass


def talk(sock: socket.socket, request: RawRequest, data: bytes, *, stay: bool = True) -> bytes:
    """Switch, send, and read until we are told to close; unless it is to `stay`, it ends without a word first."""
    switch(sock, request, after=data)
    if not stay:
        sock.shutdown(socket.SHUT_WR)
    return read_to_close(sock)


def read_to_close(sock: socket.socket) -> bytes:
    protocol, received = Protocol(Side.SERVER, max_size=None), bytearray()
    while protocol.close_rcvd is None and (data := sock.recv(1 << 20)):
        protocol.receive_data(data)
        received += data
    sock.shutdown(socket.SHUT_WR)
    return bytes(received)


CLOSE_1000 = frame(Opcode.CLOSE, b"\x03\xe8")
ENDS: dict[str, tuple[bytes, int, str]] = {
    "lost": (b"", 1011, "connection_terminated"),
    "lost within a frame": (frame(Opcode.TEXT, b"abc")[:-1], 1011, "connection_terminated"),
    "not utf-8": (frame(Opcode.TEXT, b"\xff"), 1011, "http_protocol_error"),
    "masked": (frame(Opcode.TEXT, b"abc", mask=True), 1011, "http_protocol_error"),
    "reserved opcode": (b"\x83\x00", 1011, "http_protocol_error"),
    "goes on without a beginning": (frame(Opcode.CONT, b"abc"), 1011, "http_protocol_error"),
    "close code 1005": (frame(Opcode.CLOSE, b"\x03\xed"), 1011, "http_protocol_error"),
    "too big": (frame(Opcode.BINARY, b"x" * 1001), 1009, ""),
    "too big in pieces": (frame(Opcode.TEXT, b"x" * 600, fin=False) + frame(Opcode.CONT, b"x" * 600), 1009, ""),
    "frames that carry nothing": (frame(Opcode.PONG) * 5000, 1011, "http_protocol_error"),
    "closes without a code": (frame(Opcode.CLOSE), 1000, ""),
    "closes with another one": (frame(Opcode.CLOSE, b"\x0f\xa1why"), 4001, ""),
}


@pytest.mark.parametrize(("data", "code", "reason"), ENDS.values(), ids=ENDS)
def test_what_a_backend_does_wrong_ends_its_socket_alone(
    wired: Balancer, scripted: WireBackend, data: bytes, code: int, reason: str
) -> None:
    """What it sent before that is passed on, also if all came with its 101."""
    scripted.script = lambda sock, request: talk(
        sock, request, frame(Opcode.TEXT, b"ok") + data, stay=bool(reason == "")
    )
    with opened(wired) as client:
        assert client.recv() == "ok"
        assert end_of(client)[0] == code
    record = newest(wired)
    assert (record["reason"], record["complete"]) == (reason or None, not reason)


def test_a_message_of_a_client_that_is_too_big_is_answered_with_1009(wired: Balancer, scripted: WireBackend) -> None:
    scripted.script = lambda sock, request: got.append(talk(sock, request, b"")) or hang_up(sock)
    got: list[bytes] = []
    with opened(wired) as client:
        client.send(b"x" * 1000)
        client.send(b"x" * 1001)
        assert end_of(client)[0] == 1009
    wait_until(lambda: got)
    assert 1000 < len(got[0]) < 1100  # the first one, and a close frame


def test_a_backend_that_says_nothing_to_the_handshake_is_a_504(hasty: Balancer, backend: WireBackend) -> None:
    backend.script = lambda sock, request: read_all(sock)
    with pytest.raises(InvalidStatus, match="504"), opened(hasty):
        pass


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_client_that_leaves_before_it_is_let_in_harms_nobody(
    wired: Balancer, scripted: WireBackend, is_reset: bool
) -> None:
    """Granian tells of it late, and would end the process if it were asked then for the first time."""
    left = threading.Event()

    def script(sock: socket.socket, request: RawRequest) -> None:
        left.wait(PATIENCE)
        talk(sock, request, frame(Opcode.TEXT, b"ok"))

    scripted.script = script
    with connect_raw(wired.port) as client:
        client.sendall(HANDSHAKE)
        wait_until(lambda: b"/x" in [each.target for each in scripted.requests], "the backend was asked")
        if is_reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left.set()
    assert newest(wired)["websocket"]["closed_by"] == "client"
    assert wired.status()["statistics"]["websockets"] == 0


def test_whoever_leaves_while_the_backend_is_silent_frees_its_place(scripted: WireBackend) -> None:
    scripted.script = lambda sock, request: read_all(sock)
    with Balancer(f"--backend=only={scripted.url}", "--response-timeout=60") as balancer:
        with connect_raw(balancer.port) as client:
            client.sendall(HANDSHAKE)
            wait_until(lambda: b"/x" in [each.target for each in scripted.requests], "the backend was asked")
        wait_until(lambda: balancer.status(1)["recent_requests"], "it is recorded")
        assert newest(balancer)["status"] == 499


def test_what_fails_at_the_end_of_one_does_not_keep_another_open() -> None:
    sockets, ended = Sockets(), threading.Event()
    sockets.leave_to_thread(lambda: 1 / 0)
    sockets.leave_to_thread(ended.set)
    sockets.start()
    assert ended.wait(PATIENCE)
    sockets.stop()


def test_one_that_cannot_be_opened_gives_its_place_back(balancer: Balancer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "BackendSocket", None)
    with pytest.raises(InvalidStatus, match="500"), opened(balancer):
        pass
    told = balancer.status(1)
    assert told["recent_requests"][0]["reason"] == "proxy_internal_error"
    assert told["statistics"]["websockets"] == told["backend_servers"][0]["active_connections"] == 0


# A client that keeps to no rule.


HANDSHAKE = (
    b"GET /x HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def test_a_handshake_with_a_body_is_refused(wired: Balancer) -> None:
    with_body = HANDSHAKE[:-2] + b"Content-Length: 3\r\n\r\nabc"
    with connect_raw(wired.port) as client:
        client.sendall(with_body)
        assert client.recv(65536).startswith(b"HTTP/1.1 400")


# Whoever does not read keeps the other side waiting, and not in our memory.

PIECE, PIECES = 65536, 1000  # 62 MiB in all; the kernel keeps some of it at each of four sockets


def standstill(count: Callable[[], int]) -> int:
    """What it is once it grows no more."""
    seen: list[int] = []

    def is_still() -> bool:
        seen.append(count())
        return len(seen) > 15 and seen[-15] == seen[-1]

    wait_until(is_still, "nothing moves any more")
    return seen[-1]


def test_a_client_that_does_not_read_stops_its_backend(wired_wide: Balancer, scripted: WireBackend) -> None:
    sent = 0

    def script(sock: socket.socket, request: RawRequest) -> None:
        nonlocal sent
        switch(sock, request)
        for number in range(PIECES):
            sock.sendall(frame(Opcode.BINARY, b"%c" % (number % 251) * PIECE))
            sent += 1
        sock.sendall(CLOSE_1000)
        read_to_close(sock)

    scripted.script = script
    with connect(ws(wired_wide), max_queue=1, compression=None, ping_interval=None) as client:
        assert standstill(lambda: sent) < PIECES / 2
        for number in range(PIECES):
            assert client.recv() == b"%c" % (number % 251) * PIECE
        with pytest.raises(ConnectionClosedOK):
            client.recv()
    assert newest(wired_wide)["websocket"]["messages_out"] == PIECES


def test_a_backend_that_does_not_read_stops_its_client(wired_wide: Balancer, scripted: WireBackend) -> None:
    may_read, sent = threading.Event(), 0
    got: list[int] = []

    def script(sock: socket.socket, request: RawRequest) -> None:
        switch(sock, request)
        may_read.wait(PATIENCE)
        got.append(len(read_to_close(sock)))

    def send(client: ClientConnection) -> None:
        nonlocal sent
        for _ in range(PIECES):
            client.send(b"x" * PIECE)
            sent += 1
        client.close()

    scripted.script = script
    with connect(ws(wired_wide), compression=None, ping_interval=None) as client:
        sender = threading.Thread(target=send, args=(client,))
        sender.start()
        assert standstill(lambda: sent) < PIECES / 2
        may_read.set()
        sender.join()
    wait_until(lambda: got)
    assert got[0] > PIECES * PIECE
    assert newest(wired_wide)["websocket"]["messages_in"] == PIECES


def test_a_client_that_never_reads_is_cut_off_in_the_end(wired_wide: Balancer, scripted: WireBackend) -> None:
    """The backend closes, and what it had sent before cannot go out: nor can the close frame, nor any other end."""
    data = frame(Opcode.BINARY, b"x" * PIECE) * 200
    scripted.script = lambda sock, request: talk(sock, request, data + CLOSE_1000, stay=False)
    with connect_raw(wired_wide.port) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(HANDSHAKE)
        wired_wide.library.stop(1.0)
        assert wired_wide.library.control.statistics.snapshot()[0]["active_requests"] == 0


@pytest.mark.parametrize("data", [frame(Opcode.PING, b"x" * 100), frame(Opcode.TEXT), frame(Opcode.CONT, b"", False)])
def test_frames_without_end_do_not_fill_the_memory(wired_wide: Balancer, scripted: WireBackend, data: bytes) -> None:
    """Pings that are answered to nobody, messages that say nothing, fragments that never become one."""
    sent = 0

    def script(sock: socket.socket, request: RawRequest) -> None:
        nonlocal sent
        switch(sock, request, after=frame(Opcode.TEXT, b"", False) if data[0] == 0 else b"")
        with suppress(OSError):
            while sent < 64 * MIB:
                sent += sock.send(data * (MIB // len(data)))
        hang_up(sock)

    scripted.script = script
    before = resident_bytes(os.getpid())
    with connect_raw(wired_wide.port) as client:
        client.sendall(HANDSHAKE)
        standstill(lambda: sent)
        assert resident_bytes(os.getpid()) - before < 48 * MIB


# Time, limits, the end.


def test_idle_old_and_silent_sockets_end(echo: Echo, scripted: WireBackend) -> None:
    """Neither the backend's own pings nor its answers to ours are use; only a dead one does not answer."""
    flags = [f"--backend=only={echo.url}", "--websocket-ping-interval=0.2"]
    with Balancer(*flags, "--websocket-idle-timeout=0.6") as balancer, opened(balancer, ping_interval=0.1) as client:
        assert end_of(client) == (1001, "idle for 0.6 s")
    with Balancer(*flags, "--websocket-max-age=0.3") as balancer, opened(balancer) as client:
        with pytest.raises(ConnectionClosed):
            while True:
                client.send("busy")
                client.recv()
        assert (client.close_code, client.close_reason) == (1001, "open for 0.3 s")
    scripted.script = lambda sock, request: talk(sock, request, b"")
    flags[0] = f"--backend=only={scripted.url}"
    with Balancer(*flags) as balancer, opened(balancer) as client:
        assert end_of(client) == (1011, "the backend was lost")
        assert newest(balancer)["reason"] == "http_response_timeout"


def test_there_are_only_so_many(echo: Echo) -> None:
    with Balancer(f"--backend=only={echo.url}", "--max-websockets=2") as balancer:
        with opened(balancer), opened(balancer), pytest.raises(InvalidStatus, match="503") as caught, opened(balancer):
            pass
        assert caught.value.response.headers["Retry-After"] == "1"
        assert fetch(f"{balancer.url}/")[0] == 426  # a plain request has room
        wait_until(lambda: balancer.status()["statistics"]["websockets"] == 0)
        with opened(balancer) as client:
            client.send("again")
            assert client.recv() == "again"


def test_a_drain_closes_sockets_one_after_the_other(echo: Echo) -> None:
    """Each side is told, and no client comes back at the same moment as all others."""
    before = len(echo.closes)
    with ExitStack() as stack:
        balancer = stack.enter_context(Balancer(f"--backend=only={echo.url}"))
        clients = [stack.enter_context(opened(balancer)) for _ in range(20)]
        wait_until(lambda: balancer.status()["statistics"]["websockets"] == 20)
        started, ended = time.monotonic(), []
        stopping = threading.Thread(target=balancer.library.stop, args=(2.0,))
        stopping.start()
        for client in clients:
            assert end_of(client)[0] == 1001
            ended.append(time.monotonic() - started)
        stopping.join()
    assert ended[-1] - ended[0] > 0.5
    wait_until(lambda: len(echo.closes) == before + 20)
    assert {code for code, _ in echo.closes[before:]} == {1001}


def test_a_reload_leaves_sockets_alone(echo: Echo) -> None:
    other = {"algorithm": "round_robin"}
    with Balancer(f"--backend=only={echo.url}") as balancer, opened(balancer) as client:
        assert fetch(f"{balancer.url}/algorithm", other)[0] == 200
        assert fetch(f"{balancer.url}/backends/only", {"weight": 3}, "PATCH")[0] == 200
        client.send("still")
        assert client.recv() == "still"


def test_a_backend_that_is_removed_at_once_takes_its_sockets_along(echo: Echo) -> None:
    with Balancer(f"--backend=only={echo.url}") as balancer, opened(balancer) as client:
        fetch(f"{balancer.url}/backends/only?force=1", method="DELETE")
        assert end_of(client)[0] == 1001
        assert newest(balancer)["complete"]


class HandingOver:
    """A process with a socket open that is used while the next one serves."""

    def __init__(self, stack: ExitStack, echo: Echo, workers: int) -> None:
        flags = (f"--backend=only={echo.url}", f"--workers={workers}", "--drain-timeout=1")
        self.process = stack.enter_context(BalancerProcess(*flags))
        self.client = stack.enter_context(opened(self.process))
        before = self._serving()
        self.process.send(signal.SIGUSR2)
        stack.callback(self._end_next)
        wait_until(lambda: before.isdisjoint(self._serving()), "another process serves")
        self.client.send("still")
        assert self.client.recv() == "still"

    def _serving(self) -> set[int]:
        return {each["pid"] for each in fetch_json(f"{self.process.url}/cluster")["workers"]}

    def _end_next(self) -> None:
        (pid,) = map(int, re.findall(r"process (\d+) is to take over", self.process.output))
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "it has ended")


def test_a_process_that_hands_over_keeps_its_sockets_and_tells_them_when_it_ends(echo: Echo) -> None:
    """After 10 s, which is what this takes."""
    with ExitStack() as stack:
        both = [HandingOver(stack, echo, workers) for workers in (1, 2)]
        for each in both:
            with pytest.raises(ConnectionClosed):
                each.client.recv()
            assert each.client.close_code == 1001
            wait_until(lambda one=each: one.process.popen.poll() == 0, "it has ended")


def test_a_renewal_of_the_port_lets_sockets_be(echo: Echo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a time; then they are told."""
    monkeypatch.setattr(port, "PARKED_SECONDS", 0.1)
    monkeypatch.setattr(port, "LONGEST_PARKED", 2.0)
    monkeypatch.setattr(port, "CLOSING_SECONDS", 1.0)
    monkeypatch.setattr(port, "LOOK_SECONDS", 0.1)
    file = tmp_path / "balancer.toml"
    settings = f'[[backends]]\nid = "only"\nurl = "{echo.url}"\n'
    file.write_text("max_clients = 100\n" + settings)
    with Balancer(f"--config={file}") as balancer, opened(balancer) as old:
        served = balancer.library.bridges[0]
        file.write_text("max_clients = 200\n" + settings)
        assert fetch(f"{balancer.url}/reload", method="POST")[0] == 200
        wait_until(lambda: served.sockets_before(time.monotonic() - 0.5), "a while after that")
        with opened(balancer) as new:
            old.send("old")
            assert old.recv() == "old"
            assert end_of(old)[0] == 1001
            new.send("new")
            assert new.recv() == "new"


def test_over_unix_sockets(tmp_path: Path) -> None:
    """On both sides."""
    behind, before = str(tmp_path / "backend"), str(tmp_path / "balancer")

    def process(connection: ServerConnection, request: Request) -> Response | None:
        return connection.respond(HTTPStatus.OK, "") if request.path == "/health" else None

    def handle(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with unix_serve(handle, behind, process_request=process) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with Balancer(f"--backend=only=http+unix://{behind}", f"--host=unix:{before}", wait_ready=False) as balancer:
            wait_until(lambda: balancer.library.pool.has_had_first_round())
            with unix_connect(before, "ws://x/y") as client:
                client.send("abc")
                assert client.recv() == "abc"
        server.shutdown()
        thread.join()


def test_a_backend_that_is_killed_ends_its_sockets_with_1011() -> None:
    with Process([PYTHON, "-c", ECHO_PROCESS]) as backend:
        port = wait_until(lambda: backend.lines and backend.lines[0])
        with Balancer(f"--backend=only=http://127.0.0.1:{port}") as balancer, opened(balancer) as client:
            client.send("abc")
            assert client.recv() == "abc"
            backend.send(signal.SIGKILL)
            assert end_of(client)[0] == 1011
            record = newest(balancer)
            assert (record["complete"], record["websocket"]["closed_by"]) == (False, "backend")


ECHO_PROCESS = """
import sys; sys.path.insert(0, "tests")
from test_websocket import Echo
print(Echo().url.rpartition(":")[2], flush=True)
"""

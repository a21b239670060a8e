"""Request bodies between Granian and whoever reads them: what is asked for when, and what is handed on together."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event

import pytest
from stub_granian import GONE, Client, piece
from support import Balancer, RawRequest, connect, ok, options, wait_until
from wire import WireBackend, read_response, request

from balancer.edge.bridge import WATCH_AFTER_SECONDS, Bridge
from balancer.edge.call import Call
from balancer.edge.clientbody import MOST_PIECES
from balancer.edge.listener import AHEAD_BYTES, AHEAD_IN_ALL, CONNECTION_WINDOW, STREAM_WINDOW, ClientLimits
from balancer.edge.workers import WorkerPool
from balancer.errors import ClientGone, ClientTooSlow
from balancer.protocol.request import RequestBody
from balancer.protocol.requestheads import RequestHeads
from bench import guard

KIB = 1024


def size_of(pieces: list[bytes]) -> int:
    return sum(map(len, pieces))


def bridge_of(min_body_rate: int = 0) -> Bridge:
    return Bridge(
        lambda environ, start: [b""], WorkerPool(1, 0, 1.0), options(ClientLimits, min_body_rate=min_body_rate)
    )


class Upload(Client):
    """A client with a body, and the call that takes it in."""

    def __init__(
        self, length: int | None = None, version: str = "1.1", min_body_rate: int = 0, bridge: Bridge | None = None
    ) -> None:
        super().__init__(guard.Kind("POST"))
        framing = (b"transfer-encoding", b"chunked") if length is None else (b"content-length", b"%d" % length)
        self.scope |= {"http_version": version, "headers": [(b"host", b"a"), framing]}
        self.call = Call(bridge or bridge_of(min_body_rate), self)
        self.call.request(RequestHeads())  # notes how long the body is
        assert self.call.body is not None
        self.body = self.call.body


def test_pieces_that_are_here_are_handed_on_together() -> None:
    upload = Upload()
    upload.come(piece(b"a"), piece(b"b"), piece(b""), piece(b"c"), piece(b"", more=False))
    assert upload.call.receive() == [b"a", b"b", b"c"]
    assert upload.call.receive() == []


def test_nobody_waits_for_more_once_something_is_here() -> None:
    upload = Upload(length=300 * KIB)
    upload.come(piece(b"a"))
    assert upload.call.receive() == [b"a"]


def test_what_is_joined_is_bounded() -> None:
    upload = Upload(length=10_000 * KIB)
    upload.come(*[piece(bytes(60 * KIB))] * 20)
    assert len(upload.call.receive()) == 8  # a ninth would make it more than 512 KiB
    assert len(upload.call.receive()) == 8
    upload = Upload(length=10_000)
    upload.come(*[piece(b"a")] * 1000)
    assert len(upload.call.receive()) == MOST_PIECES


@pytest.mark.parametrize(("version", "size"), [("1.1", 64 * KIB), ("2", 16 * KIB)])
def test_what_is_asked_ahead_is_bounded(version: str, size: int) -> None:
    upload = Upload(100 * 1024 * KIB, version)
    upload.come(*[piece(bytes(size))] * 800)
    taken = 0
    for _ in range(20):
        taken += size_of(upload.call.receive())
        given = sum(len(promise.result()["body"]) for promise in upload.asked if promise.done())
        assert given - taken <= AHEAD_BYTES
    assert len(upload.asked) > taken // size + 1  # but more than one is


@pytest.mark.parametrize("length", [64 * KIB, 64 * KIB + 1, 1000 * KIB])
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize(("version", "size"), [("1.1", 64 * KIB), ("2", 16 * KIB)])
def test_nothing_is_asked_for_beyond_the_end(version: str, size: int, is_known: bool, length: int) -> None:
    upload = Upload(length if is_known else None, version)
    pieces = [piece(bytes(min(size, length - at))) for at in range(0, length, size)]
    if not is_known or version == "2":
        pieces.append(piece(b"", more=False))
    upload.come(*pieces)
    assert sum(map(size_of, iter(upload.call.receive, []))) == length
    assert len(upload.asked) == len(pieces)
    assert upload.call.may_be_watched()


def test_a_client_that_would_seem_to_have_left_is_not_watched() -> None:
    """A piece larger than any before: Granian was asked beyond the end."""
    upload = Upload(length=200 * KIB)
    upload.come(piece(bytes(200 * KIB)), GONE)
    assert size_of(upload.call.receive()) == 200 * KIB
    assert upload.body.is_done
    assert not upload.call.may_be_watched()


@pytest.mark.parametrize("size", [1, 64 * KIB])
def test_a_small_body_is_asked_for_once(size: int) -> None:
    upload = Upload(length=size)
    upload.come(piece(bytes(size)))
    assert size_of(upload.call.receive()) == size
    assert len(upload.asked) == 1
    assert upload.call.receive() == []


def test_a_body_that_may_be_empty_is_asked_for_once() -> None:
    upload = Upload()
    upload.come(piece(b"", more=False))
    assert upload.call.receive() == []
    assert len(upload.asked) == 1


def test_the_reader_is_woken_by_the_piece_it_waits_for() -> None:
    upload = Upload(length=300 * KIB)
    with ThreadPoolExecutor(1) as threads:
        received = threads.submit(upload.call.receive)
        wait_until(lambda: bool(upload.asked) and upload.asked[0].is_awaited)
        upload.asked[0].keep(piece(b"late"))
        assert received.result(60) == [b"late"]


def test_a_piece_that_comes_too_late_is_not_lost() -> None:
    """Reading on after an early answer finds the piece that the reader before it gave up on."""
    upload = Upload(length=300 * KIB)
    with pytest.raises(ClientTooSlow):
        upload.call.receive(0.01)
    upload.asked[0].keep(piece(b"late"))
    assert upload.call.receive(5) == [b"late"]


def test_pieces_that_are_here_cost_no_patience() -> None:
    """Below `min_body_rate` by far, but nobody had to wait for them."""
    upload = Upload(length=3, min_body_rate=1)
    upload.body.patience = 0.0
    upload.come(piece(b"a"))
    assert upload.call.receive() == [b"a"]


@pytest.mark.parametrize("length", [0, 5, 100 * KIB])
def test_http2_bodies_are_handed_on_only_with_the_end_of_their_stream(length: int) -> None:
    """RFC 9113 section 8.1.1: more than Content-Length said may follow, and then the request must not go on."""
    upload = Upload(length, "2")
    sent = [bytes(16 * KIB)] * (length // (16 * KIB)) + [bytes(length % (16 * KIB))]
    upload.come(*[piece(part) for part in sent if part], GONE)
    taken = 0
    with pytest.raises(ClientGone):
        while pieces := upload.call.receive():
            taken += size_of(pieces)
    assert taken < (length or 1)


def paused(bridge: Bridge, version: str = "2") -> Upload:
    """What came last is with its backend, which has not read on yet."""
    upload = Upload(300 * KIB, version, bridge=bridge)
    bridge.calls[upload.call] = None
    upload.come(piece(b"a"))
    upload.call.receive()
    return upload


def test_a_client_that_may_not_send_is_not_slow() -> None:
    """RFC 9113 section 5.2: others of its connection wait for their backends, and may have used up the window."""
    bridge = bridge_of(min_body_rate=1)
    other, *_ = [paused(bridge) for _ in range(CONNECTION_WINDOW // STREAM_WINDOW)]
    upload = Upload(1, "2", bridge=bridge)
    upload.body.patience = 0.01
    with ThreadPoolExecutor(2) as threads:
        received = threads.submit(upload.call.receive)
        assert not wait([received], 0.2).done
        go_on = threads.submit(other.call.receive)
        with pytest.raises(ClientTooSlow):
            received.result(60)
        other.asked[1].keep(piece(b"b"))
        go_on.result(60)


def test_nobody_is_excused_for_longer_than_the_others_may_take() -> None:
    """Each new upload that stood still gave all others of its connection their time again."""
    bridge = bridge_of(min_body_rate=1)
    bridge.limits = replace(bridge.limits, idle_timeout=0.2)
    for _ in range(CONNECTION_WINDOW // STREAM_WINDOW):
        paused(bridge)
    upload = Upload(1, "2", bridge=bridge)
    upload.body.patience = 0.01
    with pytest.raises(ClientTooSlow):
        upload.call.receive()


@pytest.mark.parametrize("version", ["1.1", "2"])
def test_a_backend_that_is_slow_for_others_is_no_excuse(version: str) -> None:
    """Of another connection, in HTTP/1, or already answered: then nobody waits for the rest of it."""
    bridge = bridge_of(min_body_rate=1)
    other, upload = paused(bridge), Upload(1, version, bridge=bridge)
    upload.body.patience = 0.01
    if version == "2":
        other.call.start_response("413 Too Large", [])(b"")
    with pytest.raises(ClientTooSlow):
        upload.call.receive()


def test_the_more_requests_there_are_the_less_is_asked_ahead_for_each() -> None:
    bridge = bridge_of()
    assert bridge.ahead_bytes == AHEAD_BYTES
    uploads = [Upload(100 * 1024 * KIB, bridge=bridge) for _ in range(AHEAD_IN_ALL // (64 * KIB))]
    for upload in uploads:
        bridge.calls[upload.call] = None
        upload.come(*[piece(bytes(64 * KIB))] * 20)
    taken = sum(size_of(upload.call.receive()) for upload in uploads)
    given = sum(len(promise.result()["body"]) for upload in uploads for promise in upload.asked if promise.done())
    assert given - taken <= AHEAD_IN_ALL


def test_a_client_that_leaves_is_noticed_behind_what_it_sent() -> None:
    upload = Upload(length=300 * KIB)
    upload.come(piece(b"a"), GONE)
    with pytest.raises(ClientGone):
        [upload.call.receive() for _ in range(2)]
    assert upload.call.is_gone


@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_a_body_is_read_in_parts_of_any_size(size: int) -> None:
    pieces = [[b"0123456789"], [b"a", b"bc"], []]
    body = RequestBody(lambda: pieces.pop(0))
    parts = list(iter(lambda: body.read(size), b""))
    assert b"".join(parts) == b"0123456789abc"
    assert all(type(part) is bytes and len(part) <= size for part in parts)


def test_lines_are_read_after_parts_and_before() -> None:
    pieces = [[b"0123456789\nsec", b"ond"], [b" line\n"], [b"rest"]]
    body = RequestBody(lambda: pieces.pop(0) if pieces else [])
    assert body.read(3) == b"012"
    assert [body.readline(), body.readline(), body.read(), body.readline()] == [
        *(b"3456789\n", b"second line\n", b"rest", b"")
    ]


def test_large_pieces_are_not_asked_for_ahead() -> None:
    """Their size follows `max_header_bytes`, which may be large."""
    upload = Upload(length=100 * 1024 * KIB)
    upload.come(*[piece(bytes(1024 * KIB))] * 20)
    for _ in range(10):
        upload.call.receive()
    assert len(upload.asked) == 11  # the next one


# With the real server.


@pytest.fixture(scope="module")
def backend() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        yield backend


@pytest.fixture(scope="module")
def balancer(backend: WireBackend) -> Iterator[Balancer]:
    with Balancer(f"--backend=only={backend.url}") as balancer:
        yield balancer


@pytest.mark.parametrize("size", [1, 65536, 65537, 1_000_000])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_client_that_waits_for_its_answer_does_not_seem_to_have_left(
    balancer: Balancer, backend: WireBackend, chunked: bool, size: int
) -> None:
    """The answer comes when clients are watched already. To who asked beyond the end, Granian says they have left."""
    backend.reset()

    def answer_late(sock: socket.socket, request: RawRequest) -> None:
        Event().wait(3 * WATCH_AFTER_SECONDS)
        sock.sendall(ok())

    backend.script = answer_late
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
    body = bytes(size)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/", framing, method=b"POST"))
        sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (size, body) if chunked else body)
        answer = read_response(stream)
        assert answer[0] == 200, answer


@pytest.mark.parametrize("largest", [10, 5_000, 200_000])
@pytest.mark.parametrize("chunked", [True, False])
def test_pieces_of_any_size_arrive_as_they_were_sent(
    balancer: Balancer, backend: WireBackend, chunked: bool, largest: int
) -> None:
    backend.reset()
    rng = random.Random(largest)
    pieces = [rng.randbytes(rng.randint(1, largest)) for _ in range(200)]
    body = b"".join(pieces)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(b"/", framing, method=b"POST"))
        for sent in pieces:
            sock.sendall(b"%x\r\n%s\r\n" % (len(sent), sent) if chunked else sent)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        answer = read_response(stream)
        assert answer[0] == 200, answer
    assert [received.body for received in backend.requests] == [body]

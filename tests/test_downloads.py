"""Answers that their clients read slowly, or not at all: what those hold, and when they are ended."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from stub_granian import GONE, Client, Promise
from support import (
    Balancer,
    BalancerProcess,
    Start,
    StartProcess,
    active,
    connect,
    exchange,
    get,
    newest,
    options,
    read_all,
    wait_until,
)
from test_http2 import Client as Http2Client
from wire import WireBackend, post, read_response, request

from balancer.edge.bridge import Bridge
from balancer.edge.download import (
    LARGEST_ENDLESS,
    LARGEST_PIECE,
    LARGEST_PROMPT,
    LEAST_PIECE,
    UNREAD_PIECES,
    WHOLE,
    Download,
)
from balancer.edge.listener import BRIEF_SECONDS, GRACE_SECONDS, ClientLimits
from balancer.edge.workers import WorkerPool
from balancer.forwarding.forwarding import WHOLE_STREAM

MIB = 1024 * 1024
HEAD_OK = b"HTTP/1.1 200 OK\r\n"
WINDOW_UPDATE, SETTINGS, PING = 8, 4, 6


# A call whose client has no room, without any network.


class Reader(Client):
    """A client of HTTP/1 with room for `room` pieces; each promise in `held` is for one that waits."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.held: list[Promise] = []

    def send(self, message: dict[str, Any]) -> Any:
        done = super().send(message)
        if not message.get("more_body"):
            return done
        self.room -= 1
        if self.room >= 0:
            return done
        self.held.append(Promise())
        return self.held[-1]

    def read(self, room: int) -> None:
        self.room = room
        self.held.pop().keep({})


class Pieces:
    """What an app answers, piece by piece; notes which thread asked for each, and that it was closed."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = iter(pieces)
        self.threads: list[str] = []
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        self.threads.append(threading.current_thread().name)
        return next(self._pieces)

    def close(self) -> None:
        self.closed += 1


class Desk:
    """A bridge with one worker thread, and an app that answers `pieces`."""

    def __init__(self, pieces: list[bytes], room: int, **settings: Any) -> None:
        self.pieces = Pieces(pieces)
        self.pool = WorkerPool(1, 10, 30.0)
        self.bridge = Bridge(self._app, self.pool, options(ClientLimits, **{"min_body_rate": 0} | settings))  # type: ignore[arg-type]
        self.client = Reader(room)
        self.bridge.accept(self.client)

    def _app(self, environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self.pieces

    @property
    def is_parked(self) -> bool:
        """And its worker idle."""
        return bool(self.bridge._parked) and len(self.pool._idle) == 1

    def wait_parked(self) -> None:
        wait_until(lambda: self.is_parked, what="the call is parked")

    def wait_over(self) -> None:
        wait_until(lambda: self.client.is_done and self.bridge.active == 0)
        assert not self.bridge.downloads and not self.bridge._parked
        assert self.pieces.closed == 1


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Iterator[Callable[..., Desk]]:
    made: list[Desk] = []

    def begin(*arguments: Any, **settings: Any) -> Desk:
        made.append(Desk(*arguments, **settings))
        return made[-1]

    yield begin
    for each in made:
        each.pool.stop(5)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses of each pass over connections."""
    passes: list[Any] = []
    monkeypatch.setattr("balancer.edge.accepted.cut_all", lambda pairs: passes.append(set(pairs)))
    return passes


ABC = [b"a", b"b", b"c", b"d"]


def test_a_parked_call_goes_on_where_it_stood(desk: Callable[..., Desk]) -> None:
    made = desk(ABC, 1)
    made.wait_parked()
    assert made.client.received == b"ab" and made.bridge.active == 1 and len(made.bridge.downloads) == 1
    made.client.read(0)
    wait_until(lambda: made.client.received == b"abc")
    made.wait_parked()
    made.client.read(10)
    made.wait_over()
    assert made.client.received == b"abcd"
    assert all(name.startswith("worker-") for name in made.pieces.threads)


def test_a_client_that_reads_at_once_is_waited_for_without_a_switch(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.edge.listener.BRIEF_SECONDS", 10.0)
    made = desk(ABC, 1)
    wait_until(lambda: made.client.held and made.client.held[0].is_awaited)
    assert not made.bridge._parked
    made.client.read(10)
    made.wait_over()
    assert made.client.received == b"abcd"


def test_a_client_that_leaves_while_parked_ends_its_answer(desk: Callable[..., Desk], cut: list[Any]) -> None:
    made = desk(ABC, 1)
    made.wait_parked()
    made.bridge._look_around(oldest=1e18)  # asks Granian for its leaving
    made.client.asked[0].keep(GONE)
    made.wait_over()
    made.client.held.pop().keep({})  # Granian drops what nobody will take
    assert made.client.received == b"ab" and cut == []


def test_one_that_left_just_before_it_is_parked_is_not_forgotten(desk: Callable[..., Desk]) -> None:
    made = desk(ABC, 1)
    made.wait_parked()
    (call,) = made.bridge._parked
    made.bridge._take(call)  # as if its worker had not parked it yet
    made.bridge._lost(call)
    assert made.bridge.active == 1
    made.bridge.park(call)
    made.wait_over()


def test_unread_answers_are_ended_after_idle_timeout_in_one_pass(desk: Callable[..., Desk], cut: list[Any]) -> None:
    made = desk(ABC, 1, idle_timeout=60.0)
    made.wait_parked()
    (deadline,) = made.bridge._parked.values()
    made.bridge._end_slow_downloads(deadline - 1)
    assert made.is_parked and not cut
    made.bridge._end_slow_downloads(deadline)
    made.wait_over()
    assert cut == [{(("127.0.0.1", 40000), ("127.0.0.1", 9000))}]
    made.client.held.pop().keep({})  # too late: nobody has the call any more
    assert made.client.received == b"ab"


def test_what_cannot_go_on_is_broken_off(desk: Callable[..., Desk], cut: list[Any]) -> None:
    made = desk(ABC, 1)
    made.wait_parked()
    made.pool.stop(5)
    made.client.read(10)
    made.wait_over()
    assert not cut and made.client.received == b"ab" and not made.client.is_whole


def test_a_parked_call_waits_for_a_thread_though_the_queue_is_full(desk: Callable[..., Desk]) -> None:
    """It was let in already."""
    made = desk(ABC, 1)
    made.wait_parked()
    made.pool._max_queued = 0
    go = threading.Event()

    class Work:
        source = ""

        def run(self) -> None:
            go.wait(60)

    assert made.pool.submit(Work(), False)
    made.client.read(10)
    assert made.pool.queued == 1 and not made.bridge._parked
    go.set()
    made.wait_over()
    assert made.client.received == b"abcd"


def test_one_that_leaves_while_it_waits_for_a_thread_is_over(desk: Callable[..., Desk], cut: list[Any]) -> None:
    made = desk(ABC, 1)
    made.wait_parked()
    go = threading.Event()

    class Work:
        source = ""

        def run(self) -> None:
            go.wait(60)

    assert made.pool.submit(Work(), False)
    (call,) = made.bridge._parked
    made.client.read(10)
    made.bridge._lost(call)
    made.wait_over()
    go.set()
    assert made.pool.queued == 0 and cut == []


def test_the_write_of_pep_3333_waits_for_room(desk: Callable[..., Desk]) -> None:
    made = desk([], 0)
    wait_until(lambda: made.client.is_done)

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", [])
        write(b"")
        write(b"a")
        return [b"b"]

    made.bridge.app = app
    client = Reader(1)
    made.bridge.accept(client)
    wait_until(lambda: client.held and client.held[0].is_awaited)
    client.read(10)
    wait_until(lambda: client.is_done)
    assert client.received == b"ab"


class FutureReader(Reader):
    """As Granian is on Windows: its promises are futures of an event loop, for that loop's thread alone."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(1)
        self._loop = loop

    def send(self, message: dict[str, Any]) -> Any:
        promise = super().send(message)
        if not isinstance(promise, Promise):
            return promise
        future = self._loop.create_future()
        self.held[-1] = future  # type: ignore[call-overload]
        return future

    def read(self, room: int) -> None:
        self.room = room
        self._loop.call_soon_threadsafe(self.held.pop().set_result, None)  # type: ignore[attr-defined]


def test_a_parked_call_goes_on_where_promises_belong_to_an_event_loop(desk: Callable[..., Desk]) -> None:
    made = desk([], 0)
    wait_until(lambda: made.client.is_done)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="event-loop")
    thread.start()
    try:
        made.pieces, made.client = Pieces(ABC), FutureReader(loop)
        made.bridge.accept(made.client)
        made.wait_parked()
        made.client.read(10)
        made.wait_over()
        assert made.client.received == b"abcd"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# The rate, by a clock that only the test moves.


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    yield now


def begun(bridge: Bridge, length: int | None = None, *, is_http2: bool = False) -> Download:
    return Download(bridge, [], length, is_http2=is_http2)


@pytest.fixture
def bridge() -> Bridge:
    return Bridge(lambda environ, start_response: [b""], WorkerPool(1, 0, 1.0), options(ClientLimits))


def test_each_byte_pays_for_its_time_and_no_more_is_saved_than_idle_timeout(bridge: Bridge, clock: list[float]) -> None:
    made = begun(bridge)
    made.sent(240, Promise())
    assert made.deadline == 1000.0 + GRACE_SECONDS + 1
    clock[0] += 4
    made.note_room()
    made.sent(480, Promise())
    assert made.deadline == 1004.0 + GRACE_SECONDS + 1 - 4 + 2
    made.note_room()
    made.sent(10 * MIB, Promise())
    assert made.deadline == 1004.0 + 60


@pytest.mark.parametrize(("rate", "is_ended"), [(240, False), (200, True)])
def test_a_reader_below_the_rate_is_ended(bridge: Bridge, clock: list[float], rate: int, is_ended: bool) -> None:
    """In pieces that each come well within `idle_timeout`."""
    made = begun(bridge)
    late = 0
    for _ in range(1000):
        made.sent(6000, Promise())
        clock[0] += 6000 / rate
        late += clock[0] > made.deadline
        made.note_room()
    assert bool(late) is is_ended


def test_without_a_rate_only_idle_timeout_counts(bridge: Bridge, clock: list[float]) -> None:
    bridge.limits = replace(bridge.limits, min_body_rate=0)
    made = begun(bridge)
    made.sent(1, Promise())
    assert made.deadline == clock[0] + 60


def test_time_for_which_the_backend_is_waited_for_does_not_count(bridge: Bridge, clock: list[float]) -> None:
    """An event stream: its client has room all the time."""
    made = begun(bridge)
    for _ in range(1000):
        made.sent(1, None)
        clock[0] += 50
        assert made.has_room(0)


# How large the pieces are.


def sizes(bridge: Bridge, length: int, *, is_http2: bool, is_known: bool = True) -> list[int]:
    """Of a large body in one chunk, which is not to be handed over whole."""
    made = Download(bridge, [bytes(length)], length if is_known else None, is_http2=is_http2)
    found = []
    while (piece := made.next_piece()) is not None:
        found.append(len(piece))
        made.sent(len(piece), None)
    assert sum(found) == length
    return found


@pytest.mark.parametrize("is_http2", [False, True])
def test_of_the_last_pieces_nobody_tells_us_so_they_are_small(bridge: Bridge, is_http2: bool) -> None:
    whole = WHOLE_STREAM if is_http2 else WHOLE
    found = sizes(bridge, 8 * MIB, is_http2=is_http2)
    assert sum(found[-UNREAD_PIECES:]) <= whole
    assert max(found) > whole / 2 and len(found) < 250, "and the others are not"


def test_in_http2_the_first_pieces_are_small(bridge: Bridge) -> None:
    assert sum(sizes(bridge, 8 * MIB, is_http2=True)[:UNREAD_PIECES]) <= WHOLE_STREAM


@pytest.mark.parametrize(("seconds", "largest"), [(0.1, LARGEST_PROMPT), (1.0, LARGEST_PIECE)])
def test_who_reads_on_at_once_gets_larger_pieces(
    bridge: Bridge, clock: list[float], seconds: float, largest: int
) -> None:
    made = Download(bridge, [bytes(8 * MIB)], 8 * MIB, is_http2=False)
    found = []
    while (piece := made.next_piece()) is not None:
        found.append(len(piece))
        made.sent(len(piece), Promise() if len(found) > UNREAD_PIECES else None)
        clock[0] += seconds
        assert made.promise is None or not made.note_room()
    assert max(found[: UNREAD_PIECES + 1]) == LARGEST_PIECE and max(found) == largest


def test_of_an_unknown_length_each_could_be_the_last(bridge: Bridge) -> None:
    assert max(sizes(bridge, 8 * MIB, is_http2=False, is_known=False)) == LARGEST_ENDLESS


def test_the_more_downloads_the_smaller_their_pieces(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "downloads", range(1000))
    assert max(sizes(bridge, 2 * MIB, is_http2=False)[:-UNREAD_PIECES]) == LEAST_PIECE


# With real clients and backends.


def threads(balancer: BalancerProcess) -> int:
    return len(os.listdir(f"/proc/{balancer.pid}/task"))


def content(size: int) -> bytes:
    """No two of its pieces are the same, so that a lost or repeated one is seen."""
    return b"".join(number.to_bytes(8, "big") for number in range(size // 8))


def answering(body: bytes, *, is_chunked: bool = False) -> Callable[[socket.socket, Any], None]:
    """/small gets a small answer, /endless one that ends only when nobody reads it any more, everything else `body`."""

    def script(sock: socket.socket, asked: Any) -> None:
        with suppress(OSError):
            if asked.target == b"/small":
                sock.sendall(HEAD_OK + b"Content-Length: 5\r\n\r\nsmall")
            elif asked.target == b"/endless":
                sock.sendall(HEAD_OK + b"Content-Length: 1000000000000\r\n\r\n")
                while True:
                    sock.sendall(bytes(65536))
            elif is_chunked:
                sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
                for start in range(0, len(body), 50_000):
                    piece = body[start : start + 50_000]
                    sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sock.sendall(b"0\r\n\r\n")
            else:
                sock.sendall(HEAD_OK + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))

    return script


class Thrifty(Http2Client):
    """An HTTP/2 client that says how much it will take, nothing at first, and pings."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._send(SETTINGS, 0, 0, b"\0\4" + (0).to_bytes(4, "big"))

    def take(self, stream: int, size: int) -> None:
        for where in (0, stream):
            self._send(WINDOW_UPDATE, 0, where, size.to_bytes(4, "big"))

    def ping(self) -> None:
        self._send(PING, 0, 0, b"12345678")


@contextmanager
def thrifty(balancer: Balancer) -> Iterator[Thrifty]:
    with connect(balancer.port) as sock:
        client = Thrifty(sock)
        try:
            yield client
        finally:
            client.close()


def ask_http1(stack: ExitStack, balancer: Balancer, target: bytes, count: int) -> list[socket.socket]:
    """So many connections with an answer each that nobody reads."""
    made = []
    for _ in range(count):
        sock = stack.enter_context(socket.socket())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", balancer.port))
        sock.sendall(request(target))
        made.append(sock)
    return made


def ask_http2(stack: ExitStack, balancer: Balancer, target: bytes, count: int) -> list[Thrifty]:
    """The same on one connection."""
    client = stack.enter_context(thrifty(balancer))
    for number in range(count):
        client.request(2 * number + 1, (b":path", target))
    return [client]


@pytest.mark.parametrize("ask", [ask_http1, ask_http2])
def test_unread_downloads_hold_no_thread(
    start_process: StartProcess, scripted: WireBackend, ask: Callable[..., Any]
) -> None:
    """Many more of them than there are threads; others are answered, by threads too."""
    scripted.script = answering(b"")
    balancer = start_process("--max-threads=8", "--max-queued=100", "--thread-idle-timeout=1")
    before = threads(balancer)
    with ExitStack() as stack:
        held = ask(stack, balancer, b"/endless", 60)
        wait_until(lambda: active(balancer) == 60)
        wait_until(lambda: threads(balancer) <= before + 2, "no thread waits for any of them")
        for method in (b"GET", b"OPTIONS"):  # the express way, and a thread
            assert exchange(balancer.port, get(b"/small", method=method)).startswith(HEAD_OK)
        assert active(balancer) == 60
        for each in held:
            each.close()
    wait_until(lambda: active(balancer) == 0, what="they are gone with their clients")
    assert newest(balancer)["reason"] == "client_gone"
    assert balancer.backend("only")["health"]["consecutive_failures"] == 0


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("size", [120_000, 12_000_000])
def test_a_reader_that_pauses_gets_all_of_it(start: Start, scripted: WireBackend, size: int, is_chunked: bool) -> None:
    body = content(size)
    scripted.script = answering(body, is_chunked=is_chunked)
    balancer = start()
    with ExitStack() as stack:
        (sock,) = ask_http1(stack, balancer, b"/", 1)
        (h2,) = ask_http2(stack, balancer, b"/", 1)
        threading.Event().wait(3 * BRIEF_SECONDS)  # both are parked, but for what the kernel takes
        sock.settimeout(60)
        with sock.makefile("rb") as stream:
            found = read_response(stream)[2]
        assert hashlib.sha256(found).digest() == hashlib.sha256(body).digest()
        h2.take(1, size // 2)
        while len(h2.streams[1].body) < size // 2:
            h2._read_frame()
        threading.Event().wait(3 * BRIEF_SECONDS)
        h2.take(1, size)
        assert hashlib.sha256(h2.finish(1).body).digest() == hashlib.sha256(body).digest()
    assert newest(balancer)["reason"] is None
    assert [record["bytes_out"] for record in balancer.status(2)["recent_requests"]] == [size, size]


@pytest.mark.parametrize("target", [b"/endless", b"/"])
def test_an_http2_answer_that_nobody_reads_is_in_flight_until_idle_timeout(
    start: Start, scripted: WireBackend, target: bytes
) -> None:
    """Also one of 128 KB, which came whole; PINGs are no sign of reading."""
    scripted.script = answering(bytes(130_000))
    balancer = start("--idle-timeout=2")
    with ExitStack() as stack:
        (h2,) = ask_http2(stack, balancer, target, 20)
        wait_until(lambda: active(balancer) == 20)

        def is_ended() -> bool:
            h2.ping()
            return active(balancer) == 0

        wait_until(is_ended)
        h2.read_to_end()
        assert not any(stream.body for stream in h2.streams.values())
    ended = [(record["status"], record["reason"]) for record in balancer.status(20)["recent_requests"]]
    assert (499, "client_too_slow") in ended
    assert {*ended} <= {(499, "client_too_slow"), (499, "client_gone")}, (
        "a connection ends with the first of its streams"
    )
    assert balancer.backend("only")["health"]["consecutive_failures"] == 0


def test_a_stream_that_is_paused_leaves_the_others_alone(start: Start, scripted: WireBackend) -> None:
    """As browsers do with a film. It ends, and is told so when it is read on; with too many of them the connection
    does, since what was handed over for them cannot be had back."""
    scripted.script = answering(b"")
    balancer = start("--idle-timeout=1", "--header-timeout=1")
    with thrifty(balancer) as h2:
        h2.request(1, (b":path", b"/endless"))
        h2.begin(1)
        wait_until(lambda: newest(balancer)["reason"] == "client_too_slow")
        for stream in range(3, 9, 2):  # for longer than every pass over connections takes
            threading.Event().wait(1)
            h2.request(stream, (b":path", b"/small"))
            h2.take(stream, 1000)
            assert h2.finish(stream).body == b"small"
        h2.take(1, 100_000_000)
        found = h2.finish(1)
        assert found.reset_code is not None and not found.is_ended
        for stream in range(11, 511, 2):
            h2.request(stream, (b":path", b"/endless"))
        h2.read_to_end()


def test_the_dashboard_that_nobody_reads_is_ended(start: Start) -> None:
    """It needs no backend, and no thread."""
    balancer = start("--idle-timeout=1", "--max-threads=4", "--thread-idle-timeout=1")
    with ExitStack() as stack:
        (h2,) = ask_http2(stack, balancer, b"/dashboard", 50)
        assert exchange(balancer.port, get(b"/livez")).startswith(b"HTTP/1.1 200 ")
        h2.read_to_end()
        assert h2.is_closed


def test_whole_answers_that_nobody_reads_are_ended(start: Start, scripted: WireBackend) -> None:
    """They count as done, and neither PINGs nor a request now and then keep their connection."""
    scripted.script = answering(bytes(16_000))
    balancer = start("--idle-timeout=1", "--header-timeout=1")
    with ExitStack() as stack:
        (h2,) = ask_http2(stack, balancer, b"/whole", 100)
        looks = count()

        def is_closed() -> bool:
            h2.ping()
            if (number := next(looks)) % 100 == 99:
                h2.request(1001 + 2 * number, (b":path", b"/livez"), method=b"HEAD")
            h2.sync()
            return h2.is_closed

        wait_until(is_closed, "the connection is cut")


def test_a_stream_that_is_read_too_slowly_ends_alone(start: Start, scripted: WireBackend, short_grace: float) -> None:
    """Well within every `idle_timeout`, at 40,000 bytes/s where 1,000,000 are asked for."""
    scripted.script = answering(b"")
    balancer = start("--min-body-rate=1000000", "--idle-timeout=2")
    over = threading.Event()
    with thrifty(balancer) as h2:

        def take() -> None:
            while not over.wait(0.5):
                h2.take(1, 20_000)

        taking = threading.Thread(target=take, name="slow-reader")
        h2.request(1, (b":path", b"/endless"))
        taking.start()
        try:
            found = h2.finish(1)
        finally:
            over.set()
            taking.join()
        assert len(found.body) > 100_000 and found.reset_code is not None and not found.is_ended
        h2.request(3, (b":path", b"/livez"))
        h2.take(3, 1_000_000)
        assert h2.finish(3).status == 200
    record = newest(balancer)
    assert (record["reason"], record["complete"]) == ("client_too_slow", False)
    assert record["response_time"] > short_grace


def test_an_event_stream_may_be_as_slow_as_it_likes(start: Start, scripted: WireBackend, short_grace: float) -> None:
    """At 10 bytes/s, for longer than the grace: its client reads all there is."""
    ended = threading.Event()

    def script(sock: socket.socket, asked: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            ended.wait(0.5)
            sock.sendall(b"5\r\nevent\r\n")
        sock.sendall(b"0\r\n\r\n")

    scripted.script = script
    balancer = start("--min-body-rate=1000000")
    assert exchange(balancer.port, get()).count(b"event\r\n") == 5
    assert newest(balancer)["reason"] is None


def test_a_backend_that_dies_while_nobody_reads_cuts_the_answer(start: Start, scripted: WireBackend) -> None:
    go = threading.Event()

    def script(sock: socket.socket, asked: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: 1000000\r\n\r\n" + bytes(100_000))
        go.wait(60)
        raise ConnectionAbortedError

    scripted.script = script
    balancer = start()
    with thrifty(balancer) as h2:
        h2.request(1)
        h2.begin(1)
        go.set()
        wait_until(lambda: not scripted.used)
        assert active(balancer) == 1, "it is not looked at before its client reads"
        h2.take(1, 1_000_000)
        h2.finish(1)
        assert not h2.streams[1].is_ended
    record = newest(balancer)
    assert (record["reason"], record["complete"]) == ("http_response_incomplete", False)


def test_the_end_cuts_off_what_nobody_reads(start_process: StartProcess, scripted: WireBackend) -> None:
    scripted.script = answering(b"")
    balancer = start_process("--drain-timeout=1")
    with ExitStack() as stack:
        (sock,) = ask_http1(stack, balancer, b"/endless", 1)
        (h2,) = ask_http2(stack, balancer, b"/endless", 10)
        wait_until(lambda: active(balancer) == 11)
        balancer.send(signal.SIGTERM)
        assert balancer.wait() == 0
        h2.read_to_end()
        read_all(sock)  # which ends
    assert "cut off 11 requests" in balancer.output and "Traceback" not in balancer.output


def test_the_end_lets_a_reader_that_reads_on_finish(start_process: StartProcess, scripted: WireBackend) -> None:
    scripted.script = answering(content(8_000_000))
    balancer = start_process()
    with ExitStack() as stack:
        (h2,) = ask_http2(stack, balancer, b"/", 1)
        wait_until(lambda: active(balancer) == 1)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: "draining" in balancer.output)
        h2.take(1, 8_000_000)
        assert h2.finish(1).body == content(8_000_000)
    assert balancer.wait() == 0


# Threads by client address.


def test_slow_uploads_from_one_address_leave_threads_for_others(start: Start, scripted: WireBackend) -> None:
    """Each just above `min_body_rate`, so that they may go on for ever."""
    scripted.script = answering(b"")
    balancer = start("--max-threads=8", "--max-queued=8", "--min-body-rate=0")
    with ExitStack() as stack:
        uploads = [stack.enter_context(connect(balancer.port)) for _ in range(12)]
        for sock in uploads:
            sock.sendall(post(b"Content-Length: 1000000", body=b"x"))
        wait_until(lambda: balancer.status()["statistics"]["queued_requests"] == 6, what="six have threads")
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", balancer.port), 10, ("127.0.0.2", 0)) as other:
                other.sendall(get(b"/small", method=b"OPTIONS"))
                assert other.recv(100).startswith(HEAD_OK)
        assert balancer.status()["statistics"]["queued_requests"] == 6
        for sock in uploads:
            sock.close()


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_whose_threads_they_are(bridge: Bridge, host: str, source: str) -> None:
    assert bridge.source_of(host) == source

"""What a client may take: time for its body, header lines, connections, and what its request waits for."""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from types import SimpleNamespace

import pytest
from support import (
    Balancer,
    BalancerProcess,
    Clock,
    Start,
    StartProcess,
    active,
    connect,
    exchange,
    fetch,
    free_port,
    get,
    newest,
    options,
    read_all,
    split_response,
    wait_until,
)
from test_http2 import CONTINUATION, DATA, FRAME, HEADERS, PING, SETTINGS, Client, client, frame
from wire import WireBackend, post, read_response, request, resident_bytes

from balancer.edge import accepted
from balancer.edge.bridge import WATCH_AFTER_SECONDS, Bridge
from balancer.edge.call import Call
from balancer.edge.listener import GRACE_SECONDS as BODY_GRACE_SECONDS
from balancer.edge.listener import ClientLimits
from balancer.edge.workers import WorkerPool
from balancer.upstream.tcpinfo import traffic

MIB = 1024 * 1024


# Uploads that trickle: `min_body_rate`.

FRAMINGS = [
    (b"Content-Length: 1000", b"x"),  # read whole before a backend is chosen
    (b"Content-Length: 1000000", b"x"),
    (b"Transfer-Encoding: chunked", b"1\r\nx\r\n"),
]


@contextmanager
def sending(sockets: list[socket.socket], pieces: list[bytes]) -> Iterator[None]:
    """Each socket sends its piece twice a second, until the block ends."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.5):
            for sock, piece in zip(sockets, pieces, strict=True):
                with suppress(OSError):  # closed by the balancer, as it should
                    sock.sendall(piece)

    thread = threading.Thread(target=send, name="slow-uploads")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_tricklers_get_408_and_do_not_hold_threads(start: Start, scripted: WireBackend, short_grace: float) -> None:
    """They have all the threads and another request waits: without the limit, for as long as bytes come."""
    balancer = start("--max-threads=50", "--max-queued=10", "--trusted-proxies=127.0.0.1", "--control-reads=open")
    uploads = [FRAMINGS[number % len(FRAMINGS)] for number in range(50)]
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(balancer.port)) for _ in uploads]
        for sock, (framing, _) in zip(sockets, uploads, strict=True):
            sock.sendall(post(framing))
        with sending(sockets, [piece for _, piece in uploads]):
            wait_until(lambda: active(balancer) == 50)
            threading.Event().wait(3 * WATCH_AFTER_SECONDS)  # then even small bodies that do not come have a thread
            with connect(balancer.port) as other:
                other.sendall(get(b"/other"))
                wait_until(lambda: balancer.status()["statistics"]["queued_requests"] == 1)
                other.settimeout(BODY_GRACE_SECONDS + 10)  # none of them would ever end
                assert read_all(other).startswith(b"HTTP/1.1 200 ")
            for sock in sockets:
                status, lines, body = split_response(read_all(sock))  # which ends, because the connection does
                assert (status, dict(lines)[b"connection"]) == (408, b"close")
                assert "240 bytes/s" in json.loads(body)["error"]
            wait_until(lambda: active(balancer) == 0)
    slow = [record for record in balancer.status(100)["recent_requests"] if record["path"] == "/"]
    assert [(record["status"], record["reason"]) for record in slow] == [(408, "client_too_slow")] * 50
    assert balancer.backend("only")["failed_requests"] == 0
    assert 0 < len(scripted.broken) == sum(record["server_id"] is not None for record in slow)  # not left hanging


def test_an_upload_just_fast_enough_passes(start: Start, scripted: WireBackend) -> None:
    """300 bytes/s for longer than the grace."""
    balancer = start()
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 2100"))
        with sending([sock], [b"x" * 150]):
            assert read_response(stream)[0] == 200
    assert len(scripted.requests[-1].body) == 2100
    assert newest(balancer)["response_time"] > BODY_GRACE_SECONDS + 1


def test_a_fast_start_is_no_licence_to_trickle(start: Start, scripted: WireBackend, short_grace: float) -> None:
    """10 MB are 240 bytes/s for 11 hours; `idle_timeout` is the most that is saved up."""
    balancer = start("--idle-timeout=3")
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 20000000", body=b"x" * 10_000_000))
        started = time.monotonic()
        with sending([sock], [b"x"]):
            assert read_response(stream)[0] == 408
    assert time.monotonic() - started > 2


def test_any_rate_is_accepted_if_the_limit_is_off(start: Start, scripted: WireBackend, short_grace: float) -> None:
    balancer = start("--min-body-rate=0")
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 5"))
        with sending([sock], [b"x"]):
            assert read_response(stream)[0] == 200
    assert newest(balancer)["response_time"] > short_grace


def test_a_client_that_pauses_for_a_slow_backend_is_not_punished(
    start: Start, scripted: WireBackend, short_grace: float
) -> None:
    """The backend reads nothing for longer than the grace, so the client can send nothing."""
    go_on = threading.Event()
    scripted.on_head = lambda sock, request: not go_on.wait(60)
    balancer = start()
    body = b"x" * 40_000_000  # more than all buffers on the way hold
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.settimeout(60)
        sender = threading.Thread(target=sock.sendall, args=(post(b"Content-Length: %d" % len(body), body=body),))
        sender.start()
        try:
            started = time.monotonic()
            wait_until(lambda: time.monotonic() - started > short_grace + 1.5)
            assert sender.is_alive()
        finally:
            go_on.set()
        assert read_response(stream)[0] == 200
        sender.join()
    assert len(scripted.requests[-1].body) == len(body)


def test_a_trickling_http2_stream_is_ended_and_the_others_live(
    start: Start, scripted: WireBackend, short_grace: float
) -> None:
    balancer = start()
    with client(balancer) as h2:
        h2.request(1, method=b"POST", end=False)
        h2.data(1, b"x" * 100, end=False)
        started = time.monotonic()
        assert h2.finish(1).status == 408
        assert time.monotonic() - started > short_grace - 1
        h2.request(3)
        assert h2.finish(3).status == 200
    wait_until(lambda: active(balancer) == 0)
    assert {record["reason"] for record in balancer.status()["recent_requests"]} == {"client_too_slow", None}
    assert balancer.backend("only")["failed_requests"] == 0


class SlowBackend(WireBackend):
    """Reads the body of `/slow` only once it may `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that it is the balancer that holds it
        self.go_on = threading.Event()
        self.on_head = lambda sock, request: request.target == b"/slow" and not self.go_on.wait(60)

    def close(self) -> None:
        self.go_on.set()
        super().close()


@pytest.fixture
def slow() -> Iterator[SlowBackend]:
    with SlowBackend() as backend:
        yield backend


@pytest.fixture
def start_slow(start: Start, slow: SlowBackend) -> Start:
    """Starts balancers in front of the slow backend alone."""

    def begin(*arguments: str) -> Balancer:
        balancer = start(f"--backend=slow={slow.url}", *arguments)
        assert fetch(f"{balancer.url}/backends/only", method="DELETE")[0] in (200, 202, 204)
        return balancer

    return begin


def stall(h2: Client, streams: int, first: int = 1) -> list[int]:
    """Uploads of which the last bytes do not get through, because nobody reads them."""
    begun = list(range(first, first + 2 * streams, 2))
    for stream in begun:
        h2.request(stream, (b":path", b"/slow"), method=b"POST", end=False)
        assert h2.upload(stream, 16 * MIB, patience=0.2) > 0
    while not all(h2.upload(stream, 16 * MIB, patience=2 / streams) == 16 * MIB for stream in begun):
        pass  # more was on its way
    return begun


def test_who_cannot_send_because_of_a_slow_backend_is_no_slow_client(
    start_slow: Start, slow: SlowBackend, short_grace: float
) -> None:
    """A few of its uploads leave room for others: not all that the connection may send is theirs. RFC 9113 section
    5.2.2: with many the window of the connection is used up. The others wait, and are served in the end."""
    balancer = start_slow()
    with client(balancer) as h2:
        stall(h2, 4)
        h2.request(11, method=b"POST", end=False)
        assert h2.upload(11, 60 * FRAME) == 0
        h2.data(11, b"")
        assert h2.finish(11).status == 200
        stall(h2, 16, first=13)
        h2.request(99, method=b"POST", end=False)
        assert h2.upload(99, 1000, patience=short_grace + 2) == 1000
        assert not h2.streams[99].is_over
        h2.request(101)
        assert h2.finish(101).status == 200  # no body, no window
        slow.go_on.set()
        assert h2.upload(99, 1000) == 0
        h2.data(99, b"")
        assert h2.finish(99).status == 200


def test_they_wait_no_longer_than_the_slow_backend_is_given(start_slow: Start) -> None:
    balancer = start_slow("--idle-timeout=2")
    with client(balancer) as h2:
        begun = stall(h2, 20)
        h2.request(99, method=b"POST", end=False)
        assert h2.upload(99, 1000, patience=30) == 0
        h2.data(99, b"")
        assert h2.finish(99).status == 200
        assert h2.finish(begun[0]).status == 504


# Memory: what clients send and nobody reads.


@contextmanager
def holding_less(balancer: BalancerProcess, size: int) -> Iterator[None]:
    """What the process takes for what is done in the block, at its most."""
    before = resident_bytes(balancer.pid)
    yield
    grown = resident_bytes(balancer.pid, "VmHWM") - before
    assert grown < size, f"{grown / MIB:.0f} MiB"


def test_uploads_that_nobody_reads_hold_little(start_process: StartProcess, slow: SlowBackend) -> None:
    """Two connections, and the threads of their requests. It was what the windows of all streams add up to."""
    balancer = start_process(f"--backend=slow={slow.url}")
    assert fetch(f"{balancer.url}/backends/only", method="DELETE")[0] in (200, 202, 204)
    with ExitStack() as stack, holding_less(balancer, 48 * MIB):
        for _ in range(2):
            h2 = stack.enter_context(client(balancer))
            for stream in range(1, 61, 2):
                h2.request(stream, (b":path", b"/slow"), method=b"POST", end=False)
                h2.upload(stream, 8 * MIB, patience=0.1)
        assert active(balancer) == 60


@pytest.mark.parametrize("streams", [1, 50])
def test_frames_of_one_byte_hold_little(start_process: StartProcess, scripted: WireBackend, streams: int) -> None:
    """Each byte has a frame of its own to be kept account of; hyper ends the connection when these get too many."""
    balancer = start_process()
    begun = range(1, 2 * streams, 2)
    frames = b"".join(frame(DATA, 0, stream, b"x") for stream in begun) * (20_000 // streams)
    with holding_less(balancer, 50 * MIB):
        for _ in range(10):
            with client(balancer) as h2, suppress(OSError):  # the balancer has had enough
                for stream in begun:
                    h2.request(stream, method=b"POST", end=False)
                for _ in range(20):
                    h2.raw(frames)
        wait_until(lambda: active(balancer) == 0)


def test_a_head_that_never_ends_holds_little(start_process: StartProcess) -> None:
    """RFC 9113 section 10.5: CONTINUATION frames without END_HEADERS."""
    balancer = start_process()
    line = b"\0\1x\177\201\1" + bytes(256)  # a literal of one letter and 256 bytes
    with holding_less(balancer, 16 * MIB), client(balancer) as h2, suppress(OSError):
        h2.raw(frame(HEADERS, 0, 1, line))
        for _ in range(1000):
            h2.raw(frame(CONTINUATION, 0, 1, line * 60))
        h2.read_to_end()


def test_the_control_api_does_not_wait_for_slow_bodies(
    start: Start, caplog: pytest.LogCaptureFixture, short_grace: float
) -> None:
    balancer = start()
    head = b"POST /algorithm HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n%s\r\n\r\n1\r\n{"
    with connect(balancer.port) as by_length, connect(balancer.port) as chunked:
        by_length.sendall(head % b"Content-Length: 100")
        chunked.sendall(head % b"Transfer-Encoding: chunked")
        for sock in (by_length, chunked):
            status, lines, body = split_response(read_all(sock))
            assert (status, dict(lines)[b"connection"]) == (408, b"close")
            assert json.loads(body)["error"]
    assert "Traceback" not in caplog.text


# Header lines: `max_header_count`, and what the server in front refuses by itself.


def with_lines(count: int) -> bytes:
    """A request with this many header lines; two of them are always there."""
    return get(b"/", *[b"X-%d: 1" % number for number in range(count - 2)])


def test_one_header_line_too_many_is_431(start: Start, scripted: WireBackend) -> None:
    balancer = start("--max-header-count=20")
    assert exchange(balancer.port, with_lines(20)).startswith(b"HTTP/1.1 200 ")
    status, lines, body = split_response(exchange(balancer.port, with_lines(21)))
    answer = json.loads(body)
    assert (status, answer["error"]) == (431, "21 header lines, at most 20 are accepted")
    assert dict(lines)[b"x-request-id"] == answer["request_id"].encode()
    assert len(scripted.requests) == 1
    assert (newest(balancer)["status"], newest(balancer)["server_id"]) == (431, None)


def test_the_default_is_what_the_server_in_front_takes(start: Start, scripted: WireBackend) -> None:
    """It refuses more than 100 of HTTP/1 without a word of ours, and does not count those of HTTP/2."""
    balancer = start()
    assert exchange(balancer.port, with_lines(100)).startswith(b"HTTP/1.1 200 ")
    status, lines, body = split_response(exchange(balancer.port, with_lines(101)))
    assert (status, dict(lines)[b"connection"], body) == (431, b"close", b"")
    with client(balancer) as h2:
        h2.request(1, *[(b"x-%d" % number, b"1") for number in range(99)])  # and Host, from :authority
        assert h2.finish(1).status == 200
        h2.request(3, *[(b"x-%d" % number, b"1") for number in range(100)])
        refused = h2.finish(3)
        assert refused.status == 431 and json.loads(refused.body)["error"]
        h2.request(5)
        assert h2.finish(5).status == 200
    assert len(scripted.requests) == 3


# Connections: `max_clients`.


def test_heads_of_thousands_of_lines_are_not_kept(start_process: StartProcess) -> None:
    """HTTP/2 sends a line in three bytes, each of them takes 150 here. Kept, these would take 90 MB."""
    balancer = start_process()

    def send(connection: int) -> None:
        with client(balancer) as h2:
            for stream in range(1, 200, 2):
                number = b"%d-%d" % (connection, stream)
                h2.request(stream, (b"n", number), *[(b"%c" % (97 + n % 26), b"") for n in range(1750)])
                assert h2.finish(stream).status == 431

    send(0)
    before = resident_bytes(balancer.pid)
    for connection in range(1, 7):
        send(connection)
    assert resident_bytes(balancer.pid) - before < 30_000_000


def is_readable(sock: socket.socket, timeout: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(timeout))


@contextmanager
def http1(port: int) -> Iterator[Callable[[float], bool]]:
    """A connection that asks and is kept; yields what tells whether it is answered within so many seconds."""
    with connect(port) as sock:
        sock.sendall(request(b"/"))
        yield lambda timeout: is_readable(sock, timeout) and sock.recv(4096).startswith(b"HTTP/1.1 200 ")


@contextmanager
def http2(port: int) -> Iterator[Callable[[float], bool]]:
    with connect(port) as sock:
        h2 = Client(sock)
        h2.request(1)
        yield lambda timeout: is_readable(sock, timeout) and h2.finish(1).status == 200
        h2.close()


@pytest.mark.parametrize("opened", [http1, http2])
def test_connections_beyond_the_limit_wait_for_a_place(
    start: Start, opened: Callable[[int], AbstractContextManager[Callable[[float], bool]]]
) -> None:
    control = free_port()
    port = start("--max-clients=3", f"--control-port={control}", wait_ready=False).port
    wait_until(lambda: fetch(f"http://127.0.0.1:{control}/readyz")[0] == 200)
    with ExitStack() as stack:
        with opened(port) as first:
            held = [first, *(stack.enter_context(opened(port)) for _ in range(2))]
            assert all(is_answered(5) for is_answered in held)
            waiting = [stack.enter_context(opened(port)) for _ in range(2)]
            assert not any(is_answered(0.3) for is_answered in waiting)
            assert fetch(f"http://127.0.0.1:{control}/status")[0] == 200  # which has places of its own
        assert waiting[0](5)
        assert not waiting[1](0.3)
    for _ in range(7):  # all places are free again
        with opened(port) as is_answered:
            assert is_answered(5)


def test_a_pass_over_many_connections_lets_others_run_in_between() -> None:
    """And holds none of them open meanwhile, which might be about to end."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=200))
        port = listener.getsockname()[1]
        clients = [stack.enter_context(connect(port)) for _ in range(200)]
        for _ in clients:
            stack.enter_context(listener.accept()[0])
        opened = len(os.listdir("/proc/self/fd"))
        unused = accepted.Unused(("127.0.0.1", port), 0.0)

        def are_all_closed() -> bool:
            steps = 0
            for _ in unused.close(lambda client: False):
                steps += 1
                assert len(os.listdir("/proc/self/fd")) == opened
            assert steps >= 2 * len(clients) / accepted.SLICE
            return all(is_readable(sock, 0) for sock in clients)

        wait_until(are_all_closed, what="none has asked for anything")


@pytest.mark.parametrize(
    ("host", "is_it"), [("127.0.0.1", True), ("0.0.0.0", True), ("::", True), ("127.0.0.9", False)]
)
def test_a_connection_is_found_by_where_its_server_listens(host: str, is_it: bool) -> None:
    """Granian tells that, which may be all addresses, and not where the connection ends."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with connect(port) as sock, listener.accept()[0]:
            accepted.cut_all({((sock.getsockname()[0], str(sock.getsockname()[1])), (host, str(port)))})
            assert is_readable(sock, 0) is (host != "127.0.0.9")


def test_a_port_that_is_used_again_is_another_connection() -> None:
    clock = Clock(0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        unused = accepted.Unused(listener.getsockname(), 10.0, clock)
        source = free_port()
        for _ in range(2):
            with socket.create_connection(listener.getsockname(), 5, ("127.0.0.1", source)) as sock:
                with listener.accept()[0] as taken:
                    list(unused.close(lambda client: False))
                    assert not is_readable(taken, 0)
                    clock.now += 9
                    list(unused.close(lambda client: False))
                    assert not is_readable(sock, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no TIME_WAIT


class Watched:
    """A connection by itself, and passes over it at a time that only the test moves."""

    def __init__(self, stack: ExitStack) -> None:
        self.clock = Clock(0.0)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.unused = accepted.Unused(listener.getsockname(), 10.0, self.clock)
        self.sock = stack.enter_context(connect(listener.getsockname()[1]))
        self.taken = stack.enter_context(listener.accept()[0])
        self.own = self.sock.getsockname()[0], str(self.sock.getsockname()[1])

    def look(self, seconds: float, *, asks: bool = False, handed: int | None = None) -> None:
        """After so many seconds; it `asks` for something, or was handed answers that it has not read yet."""
        self.clock.now += seconds
        limited = () if handed is None else ({self.own: handed}, 60.0)
        list(self.unused.close(lambda client: asks and client == self.own, *limited))

    def bring(self, data: bytes, *, there: bool = True) -> None:
        """To the server, and as much back."""
        for sender, receiver in ((self.sock, self.taken), (self.taken, self.sock))[not there :]:
            sender.sendall(data)
            with receiver.makefile("rb") as stream:
                assert len(stream.read(len(data))) == len(data)


@pytest.fixture
def watched() -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(stack)


def test_a_connection_may_stay_for_longer_once_it_was_used(watched: Watched) -> None:
    watched.look(0, asks=True)
    for _ in range(7):
        watched.look(10)
        assert not is_readable(watched.sock, 0)
    watched.look(10)
    assert watched.sock.recv(1) == b""


def test_a_client_that_reads_on_stays_however_long_its_last_request_is_ago(watched: Watched) -> None:
    """50 answers of 16,000 bytes, read at 5,000 bytes/s, were cut after 75 s and recorded as whole."""
    watched.look(0, asks=True)
    for _ in range(3):
        before = traffic(watched.taken)[0]
        watched.bring(bytes(20_000), there=False)
        wait_until(lambda: traffic(watched.taken)[0] == before + 20_000)  # noqa: B023
        watched.look(70)
    for _ in range(2):  # what a PING brings its answer takes away again
        watched.bring(bytes(20_000))
        watched.look(40)
    assert watched.sock.recv(1) == b""


@pytest.mark.parametrize("unread", [200 * 16_000, 10 * 16_000])
def test_who_does_not_read_what_was_handed_over_is_cut_whatever_else_comes(watched: Watched, unread: int) -> None:
    """Whole answers of HTTP/2, with the windows shut: a request now and then kept megabytes of each connection."""
    for handed in (unread, 0, 0, 0, 0, 0, 0):
        if is_readable(watched.sock, 0):
            break
        watched.bring(PINGED * 100)
        watched.look(12, asks=True, handed=handed)
    assert is_readable(watched.sock, 0) is (unread > accepted.MOST_OWED)


def test_a_body_in_tiny_pieces_is_ended(balancer: Balancer, backend: WireBackend) -> None:
    """A moment's sending kept a thread and a CPU busy for minutes, after the client had left."""
    head = b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, lines, body = split_response(exchange(balancer.port, head + b"1\r\nx\r\n" * 200_000))
    assert status == 408 and (b"connection", b"close") in lines and b"pieces of less than" in body
    wait_until(lambda: active(balancer) == 0)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PINGED = frame(PING, 0, 0, bytes(8))
BEGINNINGS = {  # and what follows twice a second
    "nothing": (b"", b""),
    "part of a preface": (PREFACE[:10], b""),
    "PINGs": (PREFACE + frame(SETTINGS, 0, 0, b""), PINGED),
    "SETTINGS": (PREFACE, frame(SETTINGS, 0, 0, b"")),
    "a head that does not end": (PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, b"\x82"), b""),
}


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_a_connection_without_a_request_is_closed(start: Start, beginning: str) -> None:
    """Whatever else comes on it. `max_clients` of them shut the balancer."""
    balancer = start("--header-timeout=1")
    first, more = BEGINNINGS[beginning]
    with connect(balancer.port) as sock:
        sock.sendall(first)
        with sending([sock], [more]):
            read_all(sock)  # until it is closed


# What a request blocks on when its client leaves.


class Place:
    """Something a request can wait for."""

    def __init__(self) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


@pytest.fixture
def call() -> Call:
    bridge = Bridge(lambda environ, start_response: [b""], WorkerPool(1, 0, 1.0), options(ClientLimits))
    return Call(bridge, SimpleNamespace(scope={"http_version": "1.1"}, proto=None))


def test_what_a_request_waits_for_is_aborted_when_its_client_leaves(call: Call) -> None:
    place = Place()
    call.attach(place)
    assert place.aborted == 0
    call.disconnect()
    assert place.aborted == 1


def test_what_comes_after_the_client_has_left_is_aborted_at_once(call: Call) -> None:
    call.disconnect()
    place = Place()
    call.attach(place)
    assert place.aborted == 1


def test_what_the_request_no_longer_waits_for_is_left_alone(call: Call) -> None:
    queue, connection = Place(), Place()
    call.attach(queue)
    call.detach()
    call.attach(connection)
    call.disconnect()
    assert (queue.aborted, connection.aborted) == (0, 1)
    call.detach()
    call.disconnect()
    assert (queue.aborted, connection.aborted) == (0, 1)

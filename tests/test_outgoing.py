"""Requests as backends get them: what is looked up is what would be worked out anew, and never fills the memory."""

from __future__ import annotations

import ipaddress
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.errors import BalancerError, ClientError, CodingUnsupported, LoopDetected, TooManyHeaders
from balancer.protocol import requestheads
from balancer.protocol.messages import Line
from balancer.protocol.requestheads import RequestHead, RequestHeads
from balancer.upstream.outgoing import OutgoingRequest

OURS = b"lb-1.0123abcd"
TRUSTED = (ipaddress.ip_network("10.0.0.0/8"),)
HOST: Line = (b"host", b"a.example")
TRACE = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def heads() -> RequestHeads:
    return RequestHeads(OURS, TRUSTED)


def head_of(*lines: Line, peer: str = "192.0.2.1", version: str = "1.1") -> RequestHead:
    return heads().of(lines, peer, "http", version)


def facts(head: RequestHead) -> Any:
    refusal = None if head.refusal is None else (type(head.refusal), str(head.refusal))
    return head.lines, head.raw, head.fields, head.length, head.is_bodiless, head.trace_id, refusal


names = st.sampled_from(
    [b"host", b"accept", b"cookie", b"connection", b"via", b"content-length", b"transfer-encoding", b"x-forwarded-for",
     b"forwarded", b"traceparent", b"tracestate", b"x-request-id"]
)  # fmt: skip
values = st.sampled_from([b"a", b"b, c", b"chunked", b"5", b"accept", TRACE, b"1.1 " + OURS, b""])
sections = st.lists(st.tuples(names, values), max_size=6)
peers = st.sampled_from(["192.0.2.1", "10.1.2.3", "::1"])


@given(st.lists(st.tuples(sections, peers, st.sampled_from(["1.0", "1.1", "2"])), min_size=1, max_size=6))
def test_what_is_looked_up_is_what_would_be_worked_out(requests: list[tuple[list[Line], str, str]]) -> None:
    shared = heads()
    for lines, peer, version in [*requests, *requests]:
        assert facts(shared.of(lines, peer, "http", version)) == facts(head_of(*lines, peer=peer, version=version))


def test_one_section_that_comes_again_is_kept_for_each_peer() -> None:
    shared = heads()
    once = shared.of([HOST], "192.0.2.1", "http", "1.1")
    first = shared.of([HOST], "192.0.2.1", "http", "1.1")
    assert shared.of([HOST], "192.0.2.1", "http", "1.1") is first is not once
    for other in (("192.0.2.2", "http", "1.1"), ("192.0.2.1", "https", "1.1"), ("192.0.2.1", "http", "1.0")):
        assert shared.of([HOST], *other) is not first


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [HOST, HOST],
        [HOST, (b"via", b"1.1 " + OURS)],
        [HOST, (b"transfer-encoding", b"gzip")],
        [HOST, (b"x-request-id", b"id-1")],
        [HOST, (b"traceparent", TRACE)],
        [HOST, (b"accept", b"x" * requestheads.LARGEST_HEAD)],
        [HOST, (b"x-forwarded-for", b"x" * requestheads.LARGEST_HEAD)],  # which no backend gets to see
        [HOST, (b"x_y", b"x" * requestheads.LARGEST_HEAD)],
    ],
)
def test_what_will_not_come_again_or_is_too_long_is_not_kept(lines: list[Line]) -> None:
    shared = heads()
    found = [shared.of(lines, "::1", "http", "1.1") for _ in range(4)]
    assert len(set(map(id, found))) == 4


def test_what_is_kept_takes_no_more_than_its_room_however_it_is_cut_up() -> None:
    """Each line is three objects and three references, also if it is a byte long: so lines are counted as well."""
    for line in (b"a", b"x-forwarded-a", b"_"), (b"cookie",), (b"accept",):
        shared = heads()
        tracemalloc.start()
        try:
            for number in range(600):
                for _ in range(2):
                    lines = [(bytes(bytearray(name)), b"%d" % n) for n in range(10) for name in line]
                    shared.of([HOST, (b"x", b"%d" % number), *lines], "::1", "http", "1.1")
            assert 0.3 * requestheads.HEADS_ROOM < tracemalloc.get_traced_memory()[1] < 1.2 * requestheads.HEADS_ROOM
        finally:
            tracemalloc.stop()


def test_more_lines_than_are_accepted_are_not_even_looked_at() -> None:
    head = RequestHeads(OURS, TRUSTED, 3).of([HOST, *[(b"a", b"%d" % n) for n in range(3)]], "::1", "http", "2")
    assert (type(head.refusal), str(head.refusal)) == (TooManyHeaders, "4 header lines, at most 3 are accepted")
    assert (head.lines, head.raw) == ((), b"")


def test_a_flood_of_sections_does_not_push_out_those_that_come_again() -> None:
    shared = heads()
    useful = [shared.of([HOST], "192.0.2.1", "http", "1.1") for _ in range(2)][-1]
    for number in range(5000):
        shared.of([HOST, (b"cookie", b"%d" % number)], "192.0.2.1", "http", "1.1")
    assert shared.of([HOST], "192.0.2.1", "http", "1.1") is useful


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], ClientError),
        ([HOST, (b"via", b"1.1 " + OURS)], LoopDetected),
        ([HOST, (b"transfer-encoding", b"gzip, chunked")], CodingUnsupported),
    ],
)
def test_a_section_that_must_not_pass_says_why(lines: list[Line], error: type[BalancerError]) -> None:
    assert type(head_of(*lines).refusal) is error


@pytest.mark.parametrize(
    ("line", "version", "expected"),
    [
        (HOST, "1.1", True),
        (HOST, "2", False),
        ((b"content-length", b"0"), "1.1", False),
        ((b"transfer-encoding", b"chunked"), "1.1", False),
    ],
)
def test_whether_a_body_may_follow(line: Line, version: str, expected: bool) -> None:
    assert head_of(HOST, line, version=version).is_bodiless is expected


@pytest.mark.parametrize(
    ("method", "body", "length", "framing"),
    [
        ("GET", None, None, b""),
        ("POST", None, None, b"content-length: 0\r\n"),
        ("GET", b"four", None, b"content-length: 4\r\n"),
        ("PUT", iter(()), 7, b"content-length: 7\r\n"),
        ("DELETE", iter(()), None, b"transfer-encoding: chunked\r\n"),
    ],
)
def test_the_head_on_the_wire(method: str, body: Any, length: int | None, framing: bytes) -> None:
    request = OutgoingRequest(method, b"/a?b", [(b"x-request-id", b"id-1")], head_of(HOST, (b"accept", b"*/*")))
    if body is not None:
        request.set_body(body, length)
    assert request.head().split(b"\r\n", 6) == [
        b"%s /a?b HTTP/1.1" % method.encode(),
        b"host: a.example",
        b"accept: */*",
        b"x-forwarded-for: 192.0.2.1",
        b"x-forwarded-proto: http",
        b"x-forwarded-host: a.example",
        b"via: 1.1 %s\r\nx-request-id: id-1\r\n%s\r\n" % (OURS, framing),
    ]
    assert request.lines[0] == HOST and request.lines[-1] == (b"x-request-id", b"id-1")
    assert request.headers["X-Request-ID"] == "id-1"

"""Plain response heads: whatever the short way takes, llhttp takes too and understands in the same way."""

from __future__ import annotations

import tracemalloc

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.protocol import responseheads as heads
from balancer.protocol.responseheads import ResponseHeads
from balancer.upstream.response import ResponseHead

HEADS = ResponseHeads()
PLAIN = b"HTTP/1.1 200 OK\r\nDate: now\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n"


def by_llhttp(data: bytes) -> ResponseHead:
    head = ResponseHead(HEADS)
    head._parser = httptools.HttpResponseParser(head)
    head.feed(data)
    return head


def test_a_plain_head_is_taken() -> None:
    head = HEADS.plain(PLAIN + b"ok")
    assert head is not None
    assert (head.status, head.reason, head.options, head.size) == (200, "OK", {b"keep-alive"}, len(PLAIN))
    assert head.lines == ((b"date", b"now"), (b"content-length", b"2"), (b"connection", b"keep-alive"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        PLAIN[:-2],
        PLAIN[:-4],
        PLAIN.replace(b"1.1", b"1.0"),
        PLAIN.replace(b"1.1", b"2.0"),
        PLAIN.replace(b"200", b"100"),
        PLAIN.replace(b"200", b"101"),
        PLAIN.replace(b"200", b"600"),
        PLAIN.replace(b"200", b"0200"),
        PLAIN.replace(b"200 OK", b"200"),
        PLAIN.replace(b"Date: now", b"Transfer-Encoding: chunked"),
        PLAIN.replace(b"Date: now", b"Content-Length: 3"),
        PLAIN.replace(b"Length: 2", b"Length: +2"),
        PLAIN.replace(b"Length: 2", b"Length:"),
        PLAIN.replace(b"Length: 2", b"Length: " + b"9" * 19),
        PLAIN.replace(b"Date: now", b"Date : now"),
        PLAIN.replace(b"Date: now", b" Date: now"),
        PLAIN.replace(b"Date: now", b"Date"),
        PLAIN.replace(b"Date: now", b": now"),
        PLAIN.replace(b"Date: now", b"Date: n\x00w"),
        PLAIN.replace(b"Date: now", b"Date: n\rw"),
        PLAIN.replace(b"Date: now", b"Date: n\nw"),
        PLAIN.replace(b"\r\n", b"\n"),
        b"\r\n" + PLAIN,
    ],
)
def test_anything_else_is_left_to_llhttp(data: bytes) -> None:
    assert HEADS.plain(data) is None


names = st.sampled_from(
    [b"A", b"content-length", b"Connection", b"Transfer-Encoding", b"x y", b"", b"Set-Cookie", b"E\xc3"]
)
values = st.binary(max_size=12) | st.sampled_from([b"close", b"keep-alive, X", b"5", b" a b\t", b"chunked"])
lines = st.lists(st.tuples(names, st.sampled_from([b":", b": ", b" :", b":\t"]), values).map(b"".join), max_size=5)
statuses = st.sampled_from(
    [b"HTTP/1.1 200 OK", b"HTTP/1.1 404 ", b"HTTP/1.1 500", b"HTTP/1.1  200 OK", b"HTTP/1.1 299 \xe4"]
)


@given(statuses, lines)
def test_what_is_taken_is_what_llhttp_understands(status: bytes, lines: list[bytes]) -> None:
    data = b"\r\n".join([status, *lines, b"", b""])
    plain = HEADS.plain(data)
    if plain is None:
        return
    lengths = [line for line in lines if line.lower().startswith(b"content-length")]
    for line in lengths[1:]:  # said twice, which llhttp does not take
        lines.reverse()
        lines.remove(line)
        lines.reverse()
    other = by_llhttp(b"\r\n".join([status, *lines, b"", b""]))
    assert (plain.status, plain.reason, list(plain.lines), plain.options, list(plain.for_client)) == (
        other.status, other.reason, other.lines, other.options, other.for_client,
    )  # fmt: skip
    head = ResponseHead(HEADS)
    head.feed(data)
    assert (
        (head.has_head, head.keeps_alive)
        == (other.has_head, other.keeps_alive)
        == (True, b"close" not in plain.options)
    )


def test_what_is_remembered_is_bounded() -> None:
    """Also by objects: a head of a kilobyte may be 250 lines, each of them three."""
    tracemalloc.start()
    try:
        for number in range(1500):
            for value in (b"%d" % number, b"%d\r\n" % number + b"\r\n".join(b"a:%d" % n for n in range(150))):
                for _ in range(2):
                    HEADS.plain(PLAIN.replace(b"now", value))
                    HEADS.plain(PLAIN.replace(b"OK", value[:4]))
        room = heads.HEADS_ROOM + heads.LINES_ROOM + heads.STATUSES_ROOM
        assert tracemalloc.get_traced_memory()[1] < 1.2 * room
    finally:
        tracemalloc.stop()


def test_what_is_too_long_to_be_remembered_is_not() -> None:
    for _ in range(3):
        HEADS.plain(PLAIN.replace(b"now", b"x" * heads.LONGEST_LINE))
        HEADS.plain(PLAIN.replace(b"now", b"x" * heads.LONGEST_HEAD))
    assert max(map(len, HEADS._lines)) <= heads.LONGEST_LINE and max(map(len, HEADS._heads)) <= heads.LONGEST_HEAD


def test_a_head_that_is_shared_is_never_changed() -> None:
    for _ in range(2):  # then it is kept
        HEADS.plain(PLAIN)
    first, second = ResponseHead(HEADS), ResponseHead(HEADS)
    first.feed(PLAIN + b"ok")
    second.feed(PLAIN + b"no")
    assert first.lines is second.lines and isinstance(first.lines, tuple)
    assert (first.take(), second.take()) == (b"ok", b"no")

"""`traceparent` and `tracestate`: forwarded byte for byte when valid, dropped together when not (W3C Trace Context)."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Balancer, exchange, get
from wire import WireBackend

from balancer.protocol.messages import trace_id

ID = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
VALID = [
    f"00-{ID}-{PARENT}-01",
    f"00-{ID}-{PARENT}-00",
    f"00-{ID}-{PARENT}-ff",  # flags that mean nothing yet
    f"01-{ID}-{PARENT}-01",
    f"cc-{ID}-{PARENT}-01-what-the-future-brings",
    f"fe-{ID}-{PARENT}-01-",
    f"00-{'0' * 31}1-{'0' * 15}1-00",
]
INVALID = [
    "",
    "garbage",
    f"00-{'0' * 32}-{PARENT}-01",
    f"00-{ID}-{'0' * 16}-01",
    f"01-{'0' * 32}-{PARENT}-01",
    f"ff-{ID}-{PARENT}-01",
    f"00-{ID.upper()}-{PARENT}-01",
    f"00-{ID}-{PARENT}-0A",
    f"00-{ID}-{PARENT}-01-more",  # version 0 ends here
    f"00-{ID}-{PARENT}-01-",
    f"01-{ID}-{PARENT}-01more",
    f"00-{ID}-{PARENT}",
    f"00-{ID}-{PARENT}-1",
    f"0-{ID}-{PARENT}-01",
    f"00-{ID[1:]}-{PARENT}-01",
    f"00-{ID}0-{PARENT}-01",
    f"00_{ID}_{PARENT}_01",
    f"00-{ID}-{PARENT}-01, 00-{ID}-{PARENT}-01",
]


@pytest.mark.parametrize("value", VALID)
def test_the_trace_id_of_a_valid_one(value: str) -> None:
    assert trace_id([value.encode()]) == value[3:35]


@pytest.mark.parametrize("value", INVALID)
def test_an_invalid_one_has_none(value: str) -> None:
    assert trace_id([value.encode()]) is None
    assert trace_id([value.encode() + b"\n"]) is None


def test_none_and_two_are_invalid() -> None:
    assert trace_id([]) is None
    assert trace_id([VALID[0].encode(), VALID[0].encode()]) is None


@given(st.text("0123456789abcdefABCDEF-gx\n ", max_size=70))
def test_what_is_taken_for_valid_has_the_form(value: str) -> None:
    found = trace_id([value.encode()])
    if found is not None:
        assert re.fullmatch(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", value)
        assert found == value[3:35] and set(found) != {"0"}


# On the wire.


@pytest.mark.parametrize("value", VALID[:2])
def test_a_valid_one_goes_through_unchanged(balancer: Balancer, backend: WireBackend, value: str) -> None:
    state = [b"tracestate: rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", b"tracestate: vendor@x=1"]
    exchange(balancer.port, get(b"/", b"TraceParent: " + value.encode(), *state))
    (got,) = backend.requests
    assert got.values(b"traceparent") == [value.encode()]
    assert got.values(b"tracestate") == [b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", b"vendor@x=1"]
    assert balancer.status()["recent_requests"][0]["trace_id"] == value[3:35]


@pytest.mark.parametrize("value", INVALID[:2])
def test_an_invalid_one_is_dropped_with_its_state(balancer: Balancer, backend: WireBackend, value: str) -> None:
    answer = exchange(balancer.port, get(b"/", b"traceparent: " + value.encode(), b"tracestate: a=1", b"X-Kept: 1"))
    assert answer.startswith(b"HTTP/1.1 200")
    (got,) = backend.requests
    assert got.values(b"traceparent") == got.values(b"tracestate") == []
    assert got.values(b"x-kept") == [b"1"]
    assert balancer.status()["recent_requests"][0]["trace_id"] is None


@pytest.mark.parametrize(
    "lines",
    [
        (b"tracestate: a=1",),
        (b"traceparent: " + VALID[0].encode(), b"traceparent: " + VALID[1].encode(), b"tracestate: a=1"),
    ],
)
def test_a_state_without_its_parent_and_two_parents_are_dropped(
    balancer: Balancer, backend: WireBackend, lines: tuple[bytes, ...]
) -> None:
    exchange(balancer.port, get(b"/", *lines))
    (got,) = backend.requests
    assert got.values(b"traceparent") == got.values(b"tracestate") == []

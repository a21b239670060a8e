"""Header rules: what is forwarded, what is dropped, what is ours."""

from __future__ import annotations

import ipaddress
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from balancer.protocol import messages
from balancer.protocol.messages import (
    HOP_BY_HOP,
    NONE,
    SERVER_LINE,
    HeaderLines,
    Line,
    is_claim,
    nominated,
    parse_content_length,
    request_lines,
    response_lines,
)
from balancer.protocol.requestheads import RequestHeads

PEER = "198.51.100.7"
OURS = b"lb-1.0123abcd"
TRUSTED = (ipaddress.ip_network("198.51.100.0/24"),)
OWN = {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id", b"via"}
NEVER_NOMINATED = {b"host", b"content-length"}


def forward(
    *lines: Line, trusted: bool = False, version: str = "1.1", peer: str = PEER, scheme: str = "http"
) -> list[Line]:
    return request_lines(
        lines,
        RequestHeads().fields(lines),
        peer=peer,
        scheme=scheme,
        http_version=version,
        pseudonym=OURS,
        trusted=TRUSTED if trusted else (),
    )


def values(lines: list[Line], name: bytes) -> list[bytes]:
    return [value for key, value in lines if key == name]


# Strategies: header lines as our server gives them (lower-case names), with many of the names that matter.
special = sorted(HOP_BY_HOP | OWN | {b"host", b"content-length", b"cookie", b"set-cookie", b"forwarded", b"x-real-ip"})
names = st.sampled_from(special) | st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).map(
    str.encode
)
texts = st.text(string.ascii_letters + string.digits + " ;=/.,\"'", max_size=12).map(lambda text: text.strip().encode())
header_sections = st.lists(st.tuples(names, texts), max_size=12)


@st.composite
def connection_values(draw: st.DrawFn, wanted: list[bytes]) -> bytes:
    """`wanted` as a Connection value: any case, any optional white space, empty elements."""
    blanks = st.sampled_from([b"", b" ", b"\t", b"  \t"])
    items = []
    for name in wanted:
        spelled = b"".join(bytes([c]).upper() if draw(st.booleans()) else bytes([c]) for c in name)
        items.append(draw(blanks) + spelled + draw(blanks))
        if draw(st.booleans()):
            items.append(draw(blanks))
    return b",".join(items)


# Removing.


@given(st.data(), header_sections, st.lists(names, min_size=1, max_size=4), st.booleans())
def test_a_nominated_header_never_reaches_the_backend(
    data: st.DataObject, lines: list[Line], wanted: list[bytes], trusted: bool
) -> None:
    line = (b"connection", data.draw(connection_values(wanted)))
    place = data.draw(st.integers(0, len(lines)))
    result = forward(*lines[:place], line, *lines[place:], trusted=trusted)
    kept = {name for name, _ in result}
    assert not kept & (set(wanted) - OWN - NEVER_NOMINATED)


def returned(lines: list[Line], status: int) -> list[Line]:
    return [line for line in response_lines(lines, status, nominated(lines)) if line is not SERVER_LINE]


@given(st.data(), header_sections, st.lists(names, min_size=1, max_size=4))
def test_a_header_that_the_backend_nominates_never_reaches_the_client(
    data: st.DataObject, lines: list[Line], wanted: list[bytes]
) -> None:
    section = [*lines, (b"connection", data.draw(connection_values(wanted)))]
    assert not {name for name, _ in returned(section, 200)} & (set(wanted) - NEVER_NOMINATED)


@given(header_sections, st.booleans(), st.sampled_from(["1.0", "1.1", "2"]))
def test_no_hop_by_hop_field_survives_in_a_request(lines: list[Line], trusted: bool, version: str) -> None:
    assert not {name for name, _ in forward(*lines, trusted=trusted, version=version)} & HOP_BY_HOP


@given(header_sections, st.sampled_from([200, 204, 304, 500]))
def test_no_hop_by_hop_field_survives_in_a_response(lines: list[Line], status: int) -> None:
    assert not {name for name, _ in returned(lines, status)} & HOP_BY_HOP


@pytest.mark.parametrize("named", [[], [(b"server", b"theirs")]])
def test_an_answer_without_a_server_gets_one(named: list[Line]) -> None:
    assert response_lines([(b"etag", b"2"), *named], 200, NONE) == [(b"etag", b"2"), *(named or [SERVER_LINE])]


# Keeping.


@given(st.lists(st.tuples(st.sampled_from([b"set-cookie", b"x-a", b"x-b"]), texts), max_size=10))
def test_repeated_lines_keep_order_and_multiplicity_both_ways(lines: list[Line]) -> None:
    assert returned(lines, 200) == lines
    assert [line for line in forward((b"host", b"a"), *lines) if line[0] not in OWN | {b"host"}] == lines


@pytest.mark.parametrize(
    ("version", "expected"), [("2", [b"a=1; b=2; c=3"]), ("1.1", [b"a=1", b"b=2; c=3"])], ids=["HTTP/2", "HTTP/1.1"]
)
def test_only_the_cookies_of_http_2_are_joined(version: str, expected: list[bytes]) -> None:
    lines = [(b"host", b"a"), (b"cookie", b"a=1"), (b"x", b"1"), (b"cookie", b"b=2; c=3")]
    sent = RequestHeads().of(lines, PEER, "http", version).lines
    assert values([*sent], b"cookie") == expected


# Our own fields.


@given(st.data(), header_sections, st.booleans())
def test_our_own_fields_are_always_there_and_last(data: st.DataObject, lines: list[Line], trusted: bool) -> None:
    attack = (b"connection", data.draw(connection_values(sorted(OWN | {b"forwarded"}))))
    result = forward(*lines, attack, trusted=trusted)
    assert values(result, b"via")[-1] == b"1.1 " + OURS
    assert result[-1] == (b"via", b"1.1 " + OURS)
    assert len(values(result, b"x-forwarded-for")) == 1
    assert values(result, b"x-forwarded-for")[0].split(b", ")[-1] == PEER.encode()
    assert values(result, b"x-forwarded-proto") == [b"http"]
    assert values(result, b"x-request-id") == []  # the client's never passes; ours is new each time


def test_the_manual_names_all_claims() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.partition("\n## What clients claim\n")[2].partition("\n## ")[0]
    named = {name.lower().encode() for name in re.findall(r"`([\w-]+)`", section)}
    assert named >= messages._CLAIMS | set(messages._CLAIMED)
    by_pattern = {name for name in named if messages._CLAIMING.search(name)}
    assert {name for name in named if is_claim(name)} <= messages._CLAIMS | set(messages._CLAIMED) | by_pattern


def test_an_ipv6_peer_loses_its_zone_and_is_quoted_in_forwarded() -> None:
    given_lines = [(b"host", b"a"), (b"forwarded", b"for=x")]
    lines = request_lines(
        given_lines,
        RequestHeads().fields(given_lines),
        peer="fe80::1%eth0",
        scheme="https",
        http_version="1.1",
        pseudonym=OURS,
        trusted=(ipaddress.ip_network("fe80::/10"),),
    )
    assert values(lines, b"x-forwarded-for") == [b"fe80::1"]
    assert values(lines, b"forwarded") == [b'for=x, for="[fe80::1]";host="a";proto=https']


# The mapping view.


@given(st.lists(st.tuples(names.map(bytes.title), texts), max_size=10))
def test_header_lines_are_a_consistent_mapping(lines: list[Line]) -> None:
    headers = HeaderLines(lines)
    assert list(headers.lines) == lines
    assert len(headers) == len(list(headers)) == len(set(headers))
    for name in headers:
        expected = ", ".join(value.decode() for key, value in lines if key.lower() == name.encode())
        assert headers[name] == headers[name.upper()] == expected
        assert name in headers and name.title() in headers


@pytest.mark.parametrize("name", ["missing", "", "\u0416", "\u20ac"])
def test_a_name_that_is_not_there_is_missing_whatever_it_is(name: str) -> None:
    headers = HeaderLines([(b"a", b"1")])
    assert headers.get(name) is None
    assert name not in headers


# Numbers, names, targets.


@given(st.binary(max_size=6))
def test_what_counts_as_a_content_length_is_ascii_digits_only(data: bytes) -> None:
    is_number = bool(data) and all(c in b"0123456789" for c in data)
    try:
        assert parse_content_length(data) == int(data) and is_number
    except ValueError:
        assert not is_number

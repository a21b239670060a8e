"""Header rules: what is forwarded, what is dropped, what is ours."""

from __future__ import annotations

import ipaddress
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from balancer.errors import ClientError, LoopDetected
from balancer.protocol import messages
from balancer.protocol.messages import (
    HOP_BY_HOP,
    NONE,
    SERVER_LINE,
    HeaderLines,
    Line,
    check_host,
    check_target,
    is_claim,
    new_request_id,
    nominated,
    parse_content_length,
    request_id,
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


def test_the_list_of_hop_by_hop_fields_has_the_names_that_others_forgot() -> None:
    assert {b"proxy-connection", b"trailer", b"te", b"upgrade", b"keep-alive"} <= HOP_BY_HOP
    assert b"trailers" not in HOP_BY_HOP


@pytest.mark.parametrize(
    "name", [b"expect", b"proxy", b"content-length", b"x_forwarded_for", b"x_custom", b"transfer-encoding"]
)
def test_these_fields_are_not_forwarded(name: bytes) -> None:
    assert values(forward((b"host", b"a"), (name, b"1")), name) == []


@pytest.mark.parametrize("named", [[], [(b"server", b"theirs")]])
def test_an_answer_without_a_server_gets_one(named: list[Line]) -> None:
    assert response_lines([(b"etag", b"2"), *named], 200, NONE) == [(b"etag", b"2"), *(named or [SERVER_LINE])]


@pytest.mark.parametrize("name", [b"alt-svc", b"x-request-id", b"x-served-by", b"keep-alive"])
def test_these_fields_are_not_returned(name: bytes) -> None:
    assert returned([(name, b"1"), (b"etag", b"2")], 200) == [(b"etag", b"2")]


def test_a_204_has_no_content_length_and_a_304_keeps_it() -> None:
    lines = [(b"content-length", b"0")]
    assert returned(lines, 204) == []
    assert returned(lines, 304) == lines


def test_all_connection_lines_count() -> None:
    lines = [(b"connection", b"a"), (b"x", b"1"), (b"connection", b" B ,, c")]
    assert nominated(lines) == {b"a", b"b", b"c", b""} - NEVER_NOMINATED


# Keeping.


@given(st.lists(st.tuples(st.sampled_from([b"set-cookie", b"x-a", b"x-b"]), texts), max_size=10))
def test_repeated_lines_keep_order_and_multiplicity_both_ways(lines: list[Line]) -> None:
    assert returned(lines, 200) == lines
    assert [line for line in forward((b"host", b"a"), *lines) if line[0] not in OWN | {b"host"}] == lines


def test_the_client_s_host_is_kept_and_a_missing_one_becomes_empty() -> None:
    assert values(forward((b"host", b"shop.example:81")), b"host") == [b"shop.example:81"]
    assert values(forward(version="1.0"), b"host") == [b""]
    assert values(forward((b"host", b""), version="1.0"), b"host") == [b""]


def test_host_and_content_length_cannot_be_nominated_away() -> None:
    lines = [(b"content-length", b"2"), (b"connection", b"content-length, host")]
    assert returned(lines, 200) == [(b"content-length", b"2")]
    assert values(forward((b"host", b"a"), lines[1]), b"host") == [b"a"]


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


def test_claims_of_a_stranger_are_dropped() -> None:
    claims = [(b"x-forwarded-for", b"1.1.1.1"), (b"x-forwarded-proto", b"https"), (b"x-forwarded-host", b"bank")]
    result = forward((b"host", b"a"), *claims, (b"forwarded", b"for=1.1.1.1"), (b"x-real-ip", b"1.1.1.1"))
    assert values(result, b"x-forwarded-for") == [PEER.encode()]
    assert values(result, b"x-forwarded-proto") == [b"http"]
    assert values(result, b"x-forwarded-host") == [b"a"]
    assert values(result, b"forwarded") == values(result, b"x-real-ip") == []


def test_claims_of_a_trusted_proxy_are_kept_and_appended_to() -> None:
    claims = [(b"x-forwarded-for", b"1.1.1.1"), (b"x-forwarded-for", b"2.2.2.2"), (b"x-forwarded-proto", b"https")]
    more = [(b"x-forwarded-host", b"shop"), (b"forwarded", b"for=1.1.1.1"), (b"x-real-ip", b"1.1.1.1")]
    result = forward((b"host", b"a"), *claims, *more, trusted=True)
    assert values(result, b"x-forwarded-for") == [b"1.1.1.1, 2.2.2.2, " + PEER.encode()]
    assert values(result, b"x-forwarded-proto") == [b"https"]
    assert values(result, b"x-forwarded-host") == [b"shop"]
    assert values(result, b"forwarded") == [b'for=1.1.1.1, for=198.51.100.7;host="a";proto=http']
    assert values(result, b"x-real-ip") == [b"1.1.1.1"]


CLAIMED = [
    *(b"x-forwarded-prefix", b"x-forwarded-port", b"x-forwarded-ssl", b"x-forwarded-protocol", b"x-forwarded-scheme"),
    *(b"x-forwarded-server", b"x-forwarded-uri", b"x-forwarded-method", b"x-forwarded-user", b"x-forwarded"),
    *(b"x-forwarded-tls-client-cert", b"x-forwarded-whatever-comes", b"true-client-ip", b"cf-connecting-ip"),
    *(b"x-client-ip", b"x-cluster-client-ip", b"fastly-client-ip", b"client-ip", b"x-original-url", b"x-rewrite-url"),
    *(b"x-original-host", b"x-proxyuser-ip", b"x-envoy-external-address", b"ssl-client-verify", b"client-cert-chain"),
    *(b"x-real-ip", b"x-ssl-client-s-dn", b"x-client-cert", b"x-original-uri"),
]


@pytest.mark.parametrize("name", CLAIMED)
def test_other_claims_of_a_stranger_are_dropped_and_those_of_a_trusted_proxy_pass_as_they_came(name: bytes) -> None:
    claims = [(name, b"b"), (name, b"a, c")]
    host, other = (b"host", b"a"), (b"x-forward", b"1")  # which only looks like one
    assert forward(host, *claims, other) == forward(host, other)
    result = forward(host, *claims, other, trusted=True)
    assert [line for line in result if line[0] == name] == claims
    assert values(result, b"x-forward") == [b"1"]
    assert values(forward(host, *claims, (b"connection", name), trusted=True), name) == []


def test_the_manual_names_all_claims() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.partition("\n## What clients claim\n")[2].partition("\n## ")[0]
    named = {name.lower().encode() for name in re.findall(r"`([\w-]+)`", section)}
    assert named >= messages._CLAIMS | set(messages._CLAIMED) - {b"client-cert"}
    assert {name for name in named if is_claim(name)} <= messages._CLAIMS | set(messages._CLAIMED) | messages._ADDED_TO


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


def test_via_of_others_is_kept_in_order() -> None:
    assert values(forward((b"via", b"1.0 a"), (b"via", b"1.1 b")), b"via") == [b"1.0 a", b"1.1 b", b"1.1 " + OURS]


@pytest.mark.parametrize("value", [b"1.1 " + OURS, b"1.1 other, 2 " + OURS + b" (comment)"])
def test_our_own_name_in_via_is_a_loop(value: bytes) -> None:
    with pytest.raises(LoopDetected) as caught:
        forward((b"host", b"a"), (b"via", value))
    assert caught.value.status == 508


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


@given(st.integers(0, 10**18 - 1))
def test_a_content_length_is_decimal_digits(number: int) -> None:
    assert parse_content_length(b"%d" % number) == number
    if number < 10**15:
        assert parse_content_length(b"00%d" % number) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+5",
        "-1",
        "1_0",
        " 7",
        "7 ",
        " 7 ",
        "7\n",
        "0x10",
        "1e3",
        "1.0",
        "5, 5",
        "\u0667",
        "\u00b2",
        "9" * 19,
        "NaN",
    ],
    ids=ascii,
)
def test_anything_else_is_no_content_length(text: str) -> None:
    with pytest.raises(ValueError):
        parse_content_length(text.encode())


@given(st.binary(max_size=6))
def test_what_counts_as_a_content_length_is_ascii_digits_only(data: bytes) -> None:
    is_number = bool(data) and all(c in b"0123456789" for c in data)
    try:
        assert parse_content_length(data) == int(data) and is_number
    except ValueError:
        assert not is_number


@pytest.mark.parametrize("value", [b"abc", b"A.b_c:d+e/f=g@h-1", b"x" * 128])
def test_a_sane_request_id_is_kept(value: bytes) -> None:
    assert request_id([value]) == value


@pytest.mark.parametrize(
    "given_ids",
    [[], [b""], [b"x" * 129], [b"a b"], [b"a\n"], [b'"a"'], [b"<b>"], [b"\xc3\xa4"], [b"a,b"], [b"a", b"b"]],
    ids=repr,
)
def test_any_other_request_id_is_replaced(given_ids: list[bytes]) -> None:
    assert request_id(given_ids) is None
    made = new_request_id()
    assert made not in given_ids
    assert request_id([made]) == made


def test_new_request_ids_differ() -> None:
    assert len({new_request_id() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("method", "target", "hosts", "version"),
    [
        ("GET", b"/", [b"a"], "1.1"),
        ("GET", b"/a%2Fb?x=%20&y", [b"a.example:80"], "1.1"),
        ("GET", b"//a/../b", [b"[::1]:9000"], "2"),
        ("OPTIONS", b"*", [b"127.0.0.1"], "1.1"),
        ("GET", b"/", [], "1.0"),
        ("GET", b"/", [b""], "1.0"),
        ("GET", b"/", [b"a:"], "1.1"),
    ],
)
def test_a_good_request_passes(method: str, target: bytes, hosts: list[bytes], version: str) -> None:
    check_target(method, target), check_host(hosts, version)


@pytest.mark.parametrize(
    ("method", "target", "hosts", "version"),
    [
        ("GET", b"", [b"a"], "1.1"),
        ("GET", b"*", [b"a"], "1.1"),
        ("GET", b"http://b/", [b"a"], "1.1"),
        ("GET", b"/a b", [b"a"], "1.1"),
        ("GET", b"/a\r\nX: 1", [b"a"], "1.1"),
        ("GET", b"/\n", [b"a"], "1.1"),
        ("GET", "/\u00e4".encode(), [b"a"], "1.1"),
        ("GET", b"/", [], "1.1"),
        ("GET", b"/", [b""], "1.1"),
        ("GET", b"/", [], "2"),
        ("GET", b"/", [b"a", b"a"], "1.1"),
        ("GET", b"/", [b"a", b""], "1.0"),
        ("GET", b"/", [b"user@a"], "1.1"),
        ("GET", b"/", [b"a/b"], "1.1"),
        ("GET", b"/", [b"a b"], "1.1"),
        ("GET", b"/", [b"a:x"], "1.1"),
        ("GET", b"/", [b"a:800000"], "1.1"),
        ("GET", b"/", [b"a\n"], "1.1"),
        ("GET", b"/", [b'a"b'], "1.1"),
    ],
)
def test_a_bad_request_is_the_client_s_fault(method: str, target: bytes, hosts: list[bytes], version: str) -> None:
    with pytest.raises(ClientError) as caught:
        check_target(method, target), check_host(hosts, version)
    assert caught.value.status == 400

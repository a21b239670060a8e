"""What a gateway does to header lines, both ways; RFC 9110 is "S"."""

from __future__ import annotations

import json
import re

import pytest
from fleet import Pair
from support import Balancer, Start, exchange, free_port, newest, ok
from wire import WireBackend, ask, forwarded, post, request, returned, values

Fields = dict[bytes, list[bytes]]

# Lines that a client sends, and what a backend gets of these names.
FORWARDED: dict[str, tuple[list[bytes], Fields]] = {
    "rule 1, S 7.6.1: hop-by-hop fields, though not named": (
        [b"Keep-Alive: x", b"Proxy-Connection: x", b"TE: x", b"Upgrade: x", b"Trailer: x", b"Proxy-Authorization: x"],
        dict.fromkeys([b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"trailer", b"proxy-authorization"], []),
    ),
    "rule 1, S 7.6.1: those named in any Connection line, any case, blanks and empty members": (
        [b"Connection: X-One , ,x-TWO", b"X-One: 1", b"cOnnection:\tX-3", b"X-Two: 2", b"X-3: 3", b"X-Four: 4"],
        {b"x-one": [], b"x-two": [], b"x-3": [], b"connection": [], b"x-four": [b"4"]},
    ),
    "rule 1: what we add, and Host, cannot be named away": (
        [b"Connection: x-forwarded-for, X-Forwarded-Proto, X-Forwarded-Host, Host"],
        {b"x-forwarded-for": [b"127.0.0.1"], b"x-forwarded-proto": [b"http"], b"x-forwarded-host": [b"test"]}
        | {b"host": [b"test"]},
    ),
    "rule 2, S 5.1 and 5.3: unknown and repeated lines keep values and order": (
        [b"X-Many: one, two", b"X-Many: ", b"X-Many: a\t b  c", b"X-Many: caf\xe9", b'X-Many: "q, \\" s"', b"X.Dot: 1"],
        {b"x-many": [b"one, two", b"", b"a\t b  c", b"caf\xe9", b'"q, \\" s"'], b"x.dot": [b"1"]},
    ),
    "rule 2: cookies of HTTP/1.1 are not joined": ([b"Cookie: a=1", b"Cookie: b=2"], {b"cookie": [b"a=1", b"b=2"]}),
    "rule 6: WSGI and CGI fold `_` onto `-`": (
        [b"X_Forwarded_For: 6.6.6.6", b"X-Real_IP: 6.6.6.6", b"_: 1", b"Content_Length: 9"],
        {b"x_forwarded_for": [], b"x-real_ip": [], b"_": [], b"content_length": [], b"x-real-ip": []},
    ),
    "rule 7: httpoxy": ([b"Proxy: http://evil.example"], {b"proxy": []}),
    "rule 23, S 10.1.1: another expectation MAY be refused, here it is ignored": ([b"Expect: 200-ok"], {b"expect": []}),
    "rule 24, S 7.8: upgrades MAY be ignored; no tunnel can be smuggled": (
        [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"],
        {b"connection": [], b"upgrade": [], b"http2-settings": []},
    ),
}


@pytest.mark.parametrize(("lines", "expected"), FORWARDED.values(), ids=FORWARDED)
def test_request_fields(balancer: Balancer, backend: WireBackend, lines: list[bytes], expected: Fields) -> None:
    got = forwarded(balancer, backend, *lines)
    assert {name: got.values(name) for name in expected} == expected


# Lines that a backend answers, and what the client gets of these names.
RETURNED: dict[str, tuple[list[bytes], Fields]] = {
    "rule 1, S 7.6.1: hop-by-hop and named fields; Alt-Svc too (RFC 7838 section 2.1)": (
        [b"Connection: X-Secret, keep-alive", b"CONNECTION: x-second", b"X-Secret: 1", b"X-Second: 2", b"TE: x"]
        + [b"Keep-Alive: timeout=5", b"Proxy-Authenticate: Basic", b"Proxy-Connection: x", b"Upgrade: h2", b"X-Kept: 1"]
        + [b"Trailer: X-T", b'Alt-Svc: h3=":443"'],
        dict.fromkeys([b"x-secret", b"x-second", b"te", b"keep-alive", b"proxy-authenticate", b"proxy-connection"], [])
        | {b"upgrade": [], b"trailer": [], b"alt-svc": [], b"connection": [], b"x-kept": [b"1"]},
    ),
    "rule 1: not what says where it ends": ([b"Connection: content-length"], {b"content-length": [b"2"]}),
    "rule 2, S 5.3: repeated lines keep their order": (
        [b"X-Many: 2", b"X-Many: 1", b"Allow: GET, FOO", b"X-Odd: caf\xe9"],
        {b"x-many": [b"2", b"1"], b"allow": [b"GET, FOO"], b"x-odd": [b"caf\xe9"]},
    ),
    "rule 2, S 10.2.1: cookies are not merged": (
        [b"Set-Cookie: a=1; Expires=Wed, 01 Jan 2031 00:00:00 GMT", b"Set-Cookie: b=2", b"Set-Cookie: a=1; Path=/x"],
        {b"set-cookie": [b"a=1; Expires=Wed, 01 Jan 2031 00:00:00 GMT", b"b=2", b"a=1; Path=/x"]},
    ),
    "rule 2, S 5.1 and 6.6.1: Server, Date and Via are the origin's": (
        [b"Server: origin/1", b"Date: Tue, 15 Nov 1994 08:12:31 GMT", b"Via: 1.1 inner"],
        {b"server": [b"origin/1"], b"date": [b"Tue, 15 Nov 1994 08:12:31 GMT"], b"via": [b"1.1 inner"]},
    ),
    "design 3: X-Served-By tells the topology, whoever says it": ([b"X-Served-By: inner"], {b"x-served-by": []}),
}


@pytest.mark.parametrize(("lines", "expected"), RETURNED.values(), ids=RETURNED)
def test_response_fields(balancer: Balancer, backend: WireBackend, lines: list[bytes], expected: Fields) -> None:
    got = returned(balancer, backend, *lines)
    assert {name: values(got, name) for name in expected} == expected


def test_connection_cannot_remove_the_length_nor_ids(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 1: strip first, add after."""
    data = post(b"Connection: X-Request-ID, Via, Content-Length", b"Content-Length: 3", body=b"abc")
    assert ask(balancer.port, data)[0] == 200
    got = backend.requests[0]
    assert len(got.values(b"x-request-id")) == len(got.values(b"via")) == 1
    assert got.body == b"abc"


def test_via_is_added_with_the_version_that_was_received(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 3, S 7.6.3."""
    (via,) = forwarded(balancer, backend).values(b"via")
    assert re.fullmatch(rb"1\.1 lb-1\.[0-9a-f]+", via)
    assert exchange(balancer.port, b"GET / HTTP/1.0\r\nHost: test\r\n\r\n")
    assert backend.requests[-1].values(b"via")[0].startswith(b"1.0 ")


def test_via_of_others_is_kept_before_ours(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 3, S 7.6.3: appended, not replaced; another balancer of the same name is no loop."""
    via = forwarded(balancer, backend, b"Via: 1.0 fred", b"Via: 1.1 lb-1, 2 lb-1.00000000").values(b"via")
    assert via[:2] == [b"1.0 fred", b"1.1 lb-1, 2 lb-1.00000000"]
    assert len(via) == 3


@pytest.mark.parametrize("value", [b"%s", b"1.1 other, %s, 1.1 third", b"%s (comment)"])
def test_a_request_that_has_passed_through_us_is_a_loop(balancer: Balancer, backend: WireBackend, value: bytes) -> None:
    """Rule 3, S 7.6: 508, nothing sent."""
    own = forwarded(balancer, backend).values(b"via")[0]
    backend.requests.clear()
    status, _, body = ask(balancer.port, request(b"/", b"Via: " + value % own))
    assert status == 508
    assert "already passed" in json.loads(body)["error"]
    assert backend.seen == 0


@pytest.mark.parametrize("accept", [None, b"gzip", b"identity;q=0, *"])
def test_content_coding_is_neither_added_nor_removed(
    balancer: Balancer, backend: WireBackend, accept: bytes | None
) -> None:
    """Rule 5, S 7.7: Accept-Encoding and a coded body pass as they are; no client headers are invented."""
    body = b"\x1f\x8bnot really gzip\x00"
    backend.answer(ok(body, b"Content-Encoding: gzip", b'ETag: "strong"'))
    status, lines, got = ask(balancer.port, request(b"/", *([b"Accept-Encoding: " + accept] if accept else [])))
    assert (status, got) == (200, body)
    assert values(lines, b"content-encoding") == [b"gzip"] and values(lines, b"etag") == [b'"strong"']
    assert backend.requests[0].values(b"accept-encoding") == ([accept] if accept else [])
    assert not backend.requests[0].values(b"user-agent") + backend.requests[0].values(b"accept")


def test_proxy_variables_of_the_environment_are_not_used(
    scripted: WireBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 7."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with Balancer(f"--backend={scripted.url}") as balancer:
        assert ask(balancer.port, request())[0] == 200


# Rule 8: what is claimed of the client's side.

# The first line has what tells gunicorn that that is encrypted; two that differ are its 400 (forwarded_allow_ips).
OTHER_CLAIMS = [
    *(b"X-Forwarded-Ssl: on", b"x-forwarded-protocol: ssl", b"X-FORWARDED-SCHEME: https", b"Front-End-Https: on"),
    *(b"X-Forwarded-Port: 443", b"X-Forwarded-Server: evil", b"X-Forwarded: for=6.6.6.6", b"X-Forwarded-New: 1"),
    *(b"X-Forwarded-Uri: /admin", b"X-Forwarded-Method: DELETE", b"X-Forwarded-User: root", b"X-Original-URL: /admin"),
    *(b"X-Rewrite-Url: /admin", b"X-Original-Host: evil", b"True-Client-IP: 6.6.6.6", b"CF-Connecting-IP: 6.6.6.6"),
    *(b"X-Client-IP: 6.6.6.6", b"X-Cluster-Client-Ip: 6.6.6.6", b"Fastly-Client-IP: 6.6.6.6", b"Client-IP: 6.6.6.6"),
    *(b"X-ProxyUser-Ip: 6.6.6.6", b"X-Envoy-External-Address: 6.6.6.6", b"X-Forwarded-Tls-Client-Cert: evil"),
    *(b"X-SSL-Client-S-DN: evil", b"X-Client-Cert: evil", b"X-Original-URI: /admin"),
    *(
        b"Fly-Forwarded-Proto: https",
        b"WL-Proxy-SSL: true",
        b"CloudFront-Viewer-TLS: 1",
        b"X-Vercel-Proxied-For: 6.6.6.6",
    ),
    *(b"X-Forward-For: 6.6.6.6", b"Cluster-Client-IP: 6.6.6.6", b"X-Source-IP: 6.6.6.6", b"Ali-CDN-Real-IP: 6.6.6.6"),
    *(b"X-Sucuri-ClientIP: 6.6.6.6", b"Remote-Addr: 6.6.6.6", b"X-Amzn-Mtls-Clientcert: evil", b"X-Script-Name: /a"),
    *(b"SSL-Client-Verify: SUCCESS", b"Client-Cert-Chain: evil", b"X-Forwarded-Prefix: /a", b"X-Forwarded-Prefix: /b"),
]
CLAIMS = [
    *(b"X-Forwarded-For: 6.6.6.6, 7.7.7.7", b"X-Forwarded-For: 8.8.8.8", b"X-Forwarded-Proto: https"),
    *(b"X-Forwarded-Host: evil.example", b"Forwarded: for=6.6.6.6;proto=https", b"X-Real-IP: 6.6.6.6"),
]


def test_no_claim_of_an_untrusted_client_reaches_a_backend(balancer: Balancer, backend: WireBackend) -> None:
    """By prefix and by name, so that none contradicts what we tell ourselves."""
    plain = forwarded(balancer, backend)
    got = forwarded(balancer, backend, *CLAIMS, *OTHER_CLAIMS, b"X-Forward: 1", b"X-Originator: 1")
    assert {name for name, _ in got.lines} - {name for name, _ in plain.lines} == {b"x-forward", b"x-originator"}
    assert got.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert got.values(b"x-forwarded-proto") == [b"http"]
    assert got.values(b"x-forwarded-host") == [b"test"]


def test_claims_of_a_trusted_proxy_are_kept_and_added_to(pair: Pair) -> None:
    """RFC 7239 section 4: one line, the peer appended. All others pass line by line, unless Connection names them."""
    assert ask(pair.port, request(b"/", *CLAIMS, *OTHER_CLAIMS, b"Connection: X-Forwarded-New"))[0] == 200
    (got,) = pair.requests
    assert got.values(b"x-forwarded-for") == [b"6.6.6.6, 7.7.7.7, 8.8.8.8, 127.0.0.1"]
    assert got.values(b"x-forwarded-proto") == [b"https"]
    assert got.values(b"x-forwarded-host") == [b"evil.example"]
    assert got.values(b"forwarded") == [b'for=6.6.6.6;proto=https, for=127.0.0.1;host="test";proto=http']
    assert got.values(b"x-real-ip") == [b"6.6.6.6"]
    others = [(name.lower(), value) for name, _, value in (line.partition(b": ") for line in OTHER_CLAIMS)]
    others.remove((b"x-forwarded-new", b"1"))
    assert [line for line in got.lines if line in others] == others and not got.values(b"x-forwarded-new")


def test_a_trusted_proxy_that_claims_nothing_gets_no_forwarded(pair: Pair) -> None:
    """The de-facto fields are always there, the standard one only where the client's side speaks it."""
    assert ask(pair.port, request())[0] == 200
    assert pair.requests[0].values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert not pair.requests[0].values(b"forwarded")


# Design 3: one id from the client to the backend and back, and who answered.


@pytest.mark.parametrize("sane", [b"abc-123", b"a" * 128, b"0af7651916cd43dd8448eb211c80319c", b"A.b_c:d+/=@"])
def test_a_sane_request_id_is_kept(balancer: Balancer, backend: WireBackend, sane: bytes) -> None:
    _, lines, _ = ask(balancer.port, request(b"/", b"X-Request-ID: " + sane))
    assert values(lines, b"x-request-id") == backend.requests[0].values(b"x-request-id") == [sane]
    assert newest(balancer)["request_id"] == sane.decode()


def test_without_via_backends_get_none_of_ours_nor_of_others(start: Start, scripted: WireBackend) -> None:
    """An nginx does not compress otherwise. A loop is not seen then."""
    balancer = start("--via=false")
    assert not forwarded(balancer, scripted).values(b"via")
    assert not forwarded(balancer, scripted, b"Via: 1.1 other", b"X-Forwarded-For: 192.0.2.1").values(b"via")


@pytest.mark.parametrize(
    "bad", [[b""], [b"a b"], [b"a" * 129], [b"<script>"], [b'"x"'], [b"caf\xe9"], [b"a", b"b"], [b"a,b"]]
)
def test_a_bad_request_id_is_replaced(balancer: Balancer, backend: WireBackend, bad: list[bytes]) -> None:
    """It goes into logs and pages."""
    _, lines, _ = ask(balancer.port, request(b"/", *(b"X-Request-ID: " + value for value in bad)))
    (given,) = values(lines, b"x-request-id")
    assert backend.requests[0].values(b"x-request-id") == [given]
    assert re.fullmatch(rb"[0-9a-f-]{8,40}", given) and given not in bad


def test_request_ids_differ_and_the_backends_own_is_not_passed(balancer: Balancer, backend: WireBackend) -> None:
    backend.answer(ok(b"ok", b"X-Request-ID: from-backend"))
    ids = [values(ask(balancer.port, request())[1], b"x-request-id") for _ in range(3)]
    assert [len(found) for found in ids] == [1, 1, 1]
    assert len({found[0] for found in ids} | {b"from-backend"}) == 4


def test_served_by_names_the_backend_if_asked_for(pair: Pair) -> None:
    names = [values(ask(pair.port, request())[1], b"x-served-by") for _ in range(4)]
    assert sorted(names) == [[b"a"], [b"a"], [b"b"], [b"b"]]


def test_cookies_of_one_client_are_not_sent_for_another(balancer: Balancer, backend: WireBackend) -> None:
    """A session's cookie jar would do it."""
    backend.answer(ok(b"ok", b"Set-Cookie: session=secret; Path=/"))
    ask(balancer.port, request())
    assert not forwarded(balancer, backend).values(b"cookie")

"""The HTTP rules of a gateway, with bytes on real sockets, both directions, against the real balancer process.

RFC 9110 is "S", RFC 9112 is "M"; the numbers in front are those of the project's list of rules.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from support import Balancer, BalancerProcess, connect, exchange, free_port, get, ok, split_response, wait_until
from wire import (
    CHUNKED_ABC,
    Broken,
    WireBackend,
    hang_up,
    post,
    read_chunks,
    read_response,
    request,
    resident_bytes,
    values,
    wait_closed,
)

from balancer.protocol.origin import Origin

Parsed = tuple[int, list[tuple[bytes, bytes]], bytes]
MIB = 1024 * 1024


class Pair:
    """Two backends behind one balancer: long time limits, no body limit, a trusted client, X-Served-By on."""

    def __init__(self) -> None:
        self.backends = {"a": WireBackend(), "b": WireBackend()}
        nowhere = f"http://127.0.0.1:{free_port()}"
        self.balancer = BalancerProcess(
            *(f"--backend={name}={backend.url}" for name, backend in self.backends.items()),
            "--algorithm=round_robin",
            "--eject-after=0",  # many tests here make a backend fail
            "--response-timeout=10",
            "--idle-timeout=10",
            "--max-header-bytes=131072",
            "--trusted-proxies=127.0.0.0/8",
            "--control-reads=open",
            "--expose-backend",
            env={"HTTP_PROXY": nowhere, "http_proxy": nowhere, "ALL_PROXY": nowhere},
        )
        self.port = self.balancer.port

    def reset(self) -> None:
        for name, backend in self.backends.items():
            backend.reset()
            self.balancer.wait_healthy(name)

    def script(self, script: Callable[[socket.socket, Any], None]) -> None:
        for backend in self.backends.values():
            backend.script = script

    def on_head(self, handler: Callable[[socket.socket, Any], bool]) -> None:
        for backend in self.backends.values():
            backend.on_head = handler

    @property
    def requests(self) -> list[Any]:
        return [request for backend in self.backends.values() for request in backend.requests]

    @property
    def seen(self) -> int:
        return sum(backend.seen for backend in self.backends.values())

    def close(self) -> None:
        self.balancer.stop()
        for backend in self.backends.values():
            backend.close()


@pytest.fixture(scope="module")
def started_pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture
def pair(started_pair: Pair) -> Pair:
    started_pair.reset()
    return started_pair


def ask(port: int, data: bytes, method: bytes = b"GET") -> Parsed:
    """One request, one complete response."""
    with connect(port) as sock, sock.makefile("rb") as stream:
        sock.sendall(data)
        return read_response(stream, method)


def forwarded(balancer: Balancer, backend: WireBackend, *lines: bytes, target: bytes = b"/") -> Any:
    """The request as the backend got it."""
    assert ask(balancer.port, request(target, *lines))[0] == 200
    return backend.requests[-1]


def returned(balancer: Balancer, backend: WireBackend, *lines: bytes) -> list[tuple[bytes, bytes]]:
    """The header lines of an answer as the client got them."""
    backend.answer(ok(b"ok", *lines))
    return ask(balancer.port, request())[1]


def newest(balancer: Balancer) -> Any:
    return balancer.status()["recent_requests"][0]


def failures_of(balancer: Balancer, backend_id: str = "only") -> int:
    count: int = balancer.backend(backend_id)["health"]["consecutive_failures"]
    return count


def is_idle(balancer: Balancer) -> bool:
    status = balancer.status()
    active = [backend["active_connections"] for backend in status["backend_servers"]]
    return status["statistics"]["active_requests"] == 0 and not any(active)


# Rules 1 to 8: header lines.

HOP_BY_HOP = [b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"trailer", b"proxy-authorization"]


def test_request_hop_by_hop_fields_are_removed_even_if_not_named(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 1, S 7.6.1."""
    got = forwarded(balancer, backend, *(name + b": x" for name in HOP_BY_HOP), b"X-Kept: yes")
    assert not [name for name, _ in got.lines if name in {*HOP_BY_HOP, b"connection", b"transfer-encoding"}]
    assert got.values(b"x-kept") == [b"yes"]


def test_request_fields_named_in_any_connection_line_are_removed(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 1, S 7.6.1: all lines, comma lists, any case, blanks and empty members."""
    lines = [
        b"Connection: X-One , ,x-TWO",
        b"X-One: 1",
        b"cOnnection:\tX-Three",
        b"X-Two: 2",
        b"X-Three: 3",
        b"X-Four: 4",
    ]
    got = forwarded(balancer, backend, *lines)
    assert got.values(b"x-four") == [b"4"]
    assert not got.values(b"x-one") + got.values(b"x-two") + got.values(b"x-three") + got.values(b"connection")


def test_connection_cannot_remove_what_the_balancer_adds(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 1: strip first, add after; Host and Content-Length cannot be nominated either."""
    names = b"x-forwarded-for, X-Forwarded-Proto, X-Forwarded-Host, X-Request-ID, Via, Host, Content-Length"
    data = post(b"Connection: " + names, b"Content-Length: 3", body=b"abc")
    assert ask(balancer.port, data)[0] == 200
    got = backend.requests[0]
    assert got.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert got.values(b"x-forwarded-proto") == [b"http"]
    assert got.values(b"x-forwarded-host") == got.values(b"host") == [b"test"]
    assert len(got.values(b"x-request-id")) == len(got.values(b"via")) == 1
    assert got.body == b"abc"


def test_response_hop_by_hop_and_named_fields_are_removed(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 1, S 7.6.1, the other direction; Alt-Svc too (RFC 7838 section 2.1)."""
    lines = [
        *(b"Connection: X-Secret, keep-alive", b"CONNECTION: x-second", b"X-Secret: 1", b"X-Second: 2"),
        *(b"Keep-Alive: timeout=5", b"Proxy-Authenticate: Basic", b"Proxy-Connection: x", b"Upgrade: h2"),
        *(b"TE: x", b"Trailer: X-T", b'Alt-Svc: h3=":443"', b"X-Kept: yes"),
    ]
    got = {name for name, _ in returned(balancer, backend, *lines)}
    assert b"x-kept" in got
    removed = {b"x-secret", b"x-second", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"upgrade"}
    assert not got & (removed | {b"te", b"trailer", b"alt-svc", b"connection"})


def test_unknown_and_repeated_request_lines_keep_values_and_order(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 2, S 5.1 and 5.3: forwarded, never merged, blanks inside and bytes above 127 untouched."""
    values_sent = [b"one, two", b"", b"a\t b  c", b"caf\xe9", b'"quoted, \\" string"']
    got = forwarded(balancer, backend, *(b"X-Many: " + value for value in values_sent), b"X.Dotted: 1")
    assert got.values(b"x-many") == values_sent
    assert got.values(b"x.dotted") == [b"1"]


def test_repeated_response_lines_keep_order_and_cookies_are_not_merged(
    balancer: Balancer, backend: WireBackend
) -> None:
    """Rule 2, S 5.3 and 10.2.1."""
    cookies = [b"a=1; Expires=Wed, 01 Jan 2031 00:00:00 GMT", b"b=2", b"a=1; Path=/x"]
    lines = [b"Set-Cookie: " + cookie for cookie in cookies]
    got = returned(balancer, backend, *lines, b"X-Many: 2", b"X-Many: 1", b"Allow: GET, FOO", b"X-Odd: caf\xe9")
    assert values(got, b"set-cookie") == cookies
    assert values(got, b"x-many") == [b"2", b"1"]
    assert values(got, b"allow") == [b"GET, FOO"]
    assert values(got, b"x-odd") == [b"caf\xe9"]


def test_end_to_end_fields_of_the_answer_are_the_backends(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 2, S 5.1: Server and Date are the origin's, once each (S 6.6.1: a gateway does not replace Date)."""
    got = returned(balancer, backend, b"Server: origin/1", b"Date: Tue, 15 Nov 1994 08:12:31 GMT", b"Via: 1.1 inner")
    assert values(got, b"server") == [b"origin/1"]
    assert values(got, b"date") == [b"Tue, 15 Nov 1994 08:12:31 GMT"]
    assert values(got, b"via") == [b"1.1 inner"]


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


def test_a_request_that_has_passed_through_us_is_a_loop(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 3, S 7.6: 508, nothing sent."""
    own = forwarded(balancer, backend).values(b"via")[0]
    backend.requests.clear()
    status, _, body = ask(balancer.port, request(b"/", b"Via: 1.1 other, " + own + b", 1.1 third"))
    assert status == 508
    assert "already passed" in json.loads(body)["error"]
    assert backend.seen == 0


def test_without_via_backends_get_none_of_ours_nor_of_others(
    start: Callable[..., Balancer], scripted: WireBackend
) -> None:
    """An nginx does not compress otherwise. A loop is not seen then."""
    balancer = start("--via=false")
    assert not forwarded(balancer, scripted).values(b"via")
    assert not forwarded(balancer, scripted, b"Via: 1.1 other", b"X-Forwarded-For: 192.0.2.1").values(b"via")


def test_the_http_version_is_our_own(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 4, M 2.3: 1.1 to the backend whatever the client speaks; 1.1 to the client whatever the backend speaks."""
    backend.answer(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert exchange(balancer.port, b"GET / HTTP/1.0\r\nHost: test\r\n\r\n").startswith(b"HTTP/1.0 200")
    assert backend.requests[0].head.startswith(b"GET / HTTP/1.1\r\n")
    assert exchange(balancer.port, get()).startswith(b"HTTP/1.1 200")


RAW_TARGETS = [
    *(b"/a%2Fb", b"/%00", b"/%00?%00", b"//evil.example/x", b"/a//b/./c/../d", b"/;p=1/c;v=2", b"/%e2%98%83%2e%2E"),
    *(b"/a%20b+c", b"/?a=b&c=%zz&d='+", b"/?a?b=/c:d@e!$&'()*,;=~", b"/x%", b"/?q=%2500", b"/a:b@c", b"/?http://x/"),
    *(b"/%7Euser/~user", b"/a|b{c}^`", b'/?q=[]{}|\\^`"'),
]


@pytest.mark.parametrize("target", RAW_TARGETS)
def test_the_raw_target_arrives_byte_for_byte(balancer: Balancer, backend: WireBackend, target: bytes) -> None:
    """Rule 5, S 7.7. A few characters that are no URI characters may be refused with 400, but never changed."""
    status = ask(balancer.port, request(target))[0]
    if status == 400 and re.search(rb'[|{}^`\\"\[\]]', target):
        assert backend.seen == 0
    else:
        assert (status, backend.requests[0].target) == (200, target)


@pytest.mark.parametrize("sent", [b"/a?", b"/a#part"])
def test_empty_query_and_fragment_are_dropped(balancer: Balancer, backend: WireBackend, sent: bytes) -> None:
    """Rule 5, a known gap: the server in front parses the target, so `?` alone is lost. A fragment is no target."""
    assert forwarded(balancer, backend, target=sent).target == b"/a"


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


def test_underscore_names_are_dropped(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 6: WSGI and CGI fold `_` onto `-`, so X_Forwarded_For could pass for X-Forwarded-For."""
    got = forwarded(
        balancer, backend, b"X_Forwarded_For: 6.6.6.6", b"X-Real_IP: 6.6.6.6", b"_: 1", b"Content_Length: 9"
    )
    assert not [name for name, _ in got.lines if b"_" in name]
    assert b"6.6.6.6" not in got.head


def test_the_proxy_header_is_dropped(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 7, httpoxy."""
    assert not forwarded(balancer, backend, b"Proxy: http://evil.example").values(b"proxy")


def test_proxy_variables_of_the_environment_are_not_used(pair: Pair) -> None:
    """Rule 7: this balancer was started with HTTP_PROXY and ALL_PROXY naming a closed port."""
    assert ask(pair.port, request())[0] == 200
    assert not pair.requests[0].values(b"proxy")


# Each tells gunicorn that the client's side is encrypted; two that differ are its 400 (forwarded_allow_ips).
SCHEMES = [b"X-Forwarded-Ssl: on", b"x-forwarded-protocol: ssl", b"X-FORWARDED-SCHEME: https", b"Front-End-Https: on"]
OTHER_CLAIMS = [
    *(
        *SCHEMES,
        b"X-Forwarded-Prefix: /evil",
        b"X-Forwarded-Port: 443",
        b"X-Forwarded-Server: evil",
        b"Client-IP: 6.6.6.6",
    ),
    *(b"X-Forwarded-Uri: /admin", b"X-Forwarded-Method: DELETE", b"X-Forwarded-User: root", b"X-Original-URL: /admin"),
    *(b"X-Rewrite-Url: /admin", b"X-Original-Host: evil", b"True-Client-IP: 6.6.6.6", b"CF-Connecting-IP: 6.6.6.6"),
    *(b"X-Client-IP: 6.6.6.6", b"X-Cluster-Client-Ip: 6.6.6.6", b"Fastly-Client-IP: 6.6.6.6"),
    *(b"X-ProxyUser-Ip: 6.6.6.6", b"X-Envoy-External-Address: 6.6.6.6", b"X-Forwarded-Tls-Client-Cert: evil"),
]
CLAIMS = [
    *(b"X-Forwarded-For: 6.6.6.6, 7.7.7.7", b"X-Forwarded-For: 8.8.8.8", b"X-Forwarded-Proto: https"),
    *(b"X-Forwarded-Host: evil.example", b"Forwarded: for=6.6.6.6;proto=https", b"X-Real-IP: 6.6.6.6"),
]


def test_claims_of_an_untrusted_client_are_dropped(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 8."""
    got = forwarded(balancer, backend, *CLAIMS)
    assert got.values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert got.values(b"x-forwarded-proto") == [b"http"]
    assert got.values(b"x-forwarded-host") == [b"test"]
    assert not got.values(b"forwarded") + got.values(b"x-real-ip")


def test_no_other_claim_of_an_untrusted_client_reaches_a_backend(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 8: by prefix and by name, so that none contradicts what we tell ourselves."""
    plain = forwarded(balancer, backend)
    got = forwarded(balancer, backend, *OTHER_CLAIMS, b"X-Forward: 1", b"X-Originator: 1")
    assert {name for name, _ in got.lines} - {name for name, _ in plain.lines} == {b"x-forward", b"x-originator"}


def test_other_claims_of_a_trusted_proxy_pass_as_they_came(pair: Pair) -> None:
    """Rule 8: line by line."""
    assert ask(pair.port, request(b"/", *OTHER_CLAIMS, b"X-Forwarded-Prefix: /b"))[0] == 200
    (got,) = pair.requests
    for line in OTHER_CLAIMS[:4] + OTHER_CLAIMS[5:]:
        name, _, value = line.partition(b": ")
        assert got.values(name) == [value]
    assert got.values(b"x-forwarded-prefix") == [b"/evil", b"/b"]


def test_claims_of_a_trusted_proxy_are_kept_and_added_to(pair: Pair) -> None:
    """Rule 8, RFC 7239 section 4: one line, the peer appended."""
    assert ask(pair.port, request(b"/", *CLAIMS))[0] == 200
    (got,) = pair.requests
    assert got.values(b"x-forwarded-for") == [b"6.6.6.6, 7.7.7.7, 8.8.8.8, 127.0.0.1"]
    assert got.values(b"x-forwarded-proto") == [b"https"]
    assert got.values(b"x-forwarded-host") == [b"evil.example"]
    assert got.values(b"forwarded") == [b'for=6.6.6.6;proto=https, for=127.0.0.1;host="test";proto=http']
    assert got.values(b"x-real-ip") == [b"6.6.6.6"]


def test_a_trusted_proxy_that_claims_nothing_gets_no_forwarded(pair: Pair) -> None:
    """Rule 8: the de-facto fields are always there, the standard one only where the client's side speaks it."""
    assert ask(pair.port, request())[0] == 200
    assert pair.requests[0].values(b"x-forwarded-for") == [b"127.0.0.1"]
    assert not pair.requests[0].values(b"forwarded")


# Rules 9 to 13: target and Host.

BAD_HOSTS = [b"", b"a b", b"user@host", b"a/b", b"a:80:90", b"[::1", b"a\\b", b"a:x", b"a?b", b"a#b", b"<a>", b'"a"']


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_a_bad_host_is_refused(balancer: Balancer, backend: WireBackend, host: bytes) -> None:
    """Rule 9, M 3.2."""
    assert split_response(exchange(balancer.port, get(host=host)))[0] == 400
    assert backend.seen == 0


@pytest.mark.parametrize(
    "lines", [[], [b"Host: a", b"Host: a"], [b"Host: a", b"hOST: b"], [b"Host : a"], [b"Host_: a"]]
)
def test_no_host_or_more_than_one_is_refused(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rule 9, M 3.2."""
    head = b"\r\n".join([b"GET / HTTP/1.1", b"Connection: close", *lines])
    assert split_response(exchange(balancer.port, head + b"\r\n\r\n"))[0] == 400
    assert backend.seen == 0


NOT_SERVED = {
    "no host": b"GET %s HTTP/1.1",
    "two hosts": b"GET %s HTTP/1.1\r\nHost: localhost\r\nHost: localhost",
    "a bad host": b"GET %s HTTP/1.1\r\nHost: a b",
    "CONNECT": b"CONNECT %s HTTP/1.1\r\nHost: localhost",
    "tunnel": b"CONNECT test:443 HTTP/1.1\r\nHost: test:443",
    "TRACE": b"TRACE %s HTTP/1.1\r\nHost: localhost",
    "another coding": b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked",
}


@pytest.mark.parametrize("path", [b"/", b"/livez"])
@pytest.mark.parametrize("head", NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_is_refused_by_its_head_is_the_last_of_its_connection(
    balancer: Balancer, backend: WireBackend, head: bytes, path: bytes
) -> None:
    """M 9.6: what follows may be a part of it, by another reading."""
    data = exchange(balancer.port, head.replace(b"%s", path) + b"\r\n\r\n" + request(b"/next"))
    status, lines, _ = split_response(data)
    assert status in (400, 403, 405, 501) and (b"connection", b"close") in lines
    assert data.count(b"HTTP/1.1 ") == 1 and not backend.requests


@pytest.mark.parametrize(
    "host", [b"test", b"TeSt.Example:8080", b"127.0.0.1:9000", b"[::1]:80", b"xn--bcher-kva.example"]
)
def test_the_clients_host_is_kept(balancer: Balancer, backend: WireBackend, host: bytes) -> None:
    """Rule 13."""
    assert split_response(exchange(balancer.port, get(host=host)))[0] == 200
    assert backend.requests[0].values(b"host") == [host]


@pytest.mark.parametrize("line", [b"", b"Host:\r\n"], ids=["none", "empty"])
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS"])
def test_http_1_0_needs_no_host(balancer: Balancer, backend: WireBackend, method: bytes, line: bytes) -> None:
    """Rule 9, M 3.2: required in 1.1 only; what we send has the backend's, first, and no claim of another one."""
    assert exchange(balancer.port, method + b" / HTTP/1.0\r\n" + line + b"\r\n").startswith(b"HTTP/1.0 200")
    got = backend.requests[0]
    assert got.lines[0] == (b"host", b"127.0.0.1:%d" % backend.port)
    assert not got.values(b"x-forwarded-host")


def test_absolute_form_becomes_origin_form(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 10, M 3.2.2."""
    got = forwarded(balancer, backend, target=b"http://test/x%2Fy?z")
    assert (got.target, got.values(b"host")) == (b"/x%2Fy?z", [b"test"])


def test_absolute_form_with_another_host_goes_by_the_host_line(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 10, M 3.2.2, a known gap: the URI's host should win, but the server in front does not hand it on.

    One host only reaches the backend, so there is no confusion behind us.
    """
    got = forwarded(balancer, backend, target=b"http://other/x")
    assert (got.target, got.values(b"host")) == (b"/x", [b"test"])
    assert b"other" not in got.head


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE"])
@pytest.mark.parametrize("target", [b"/", b"test:80"])
def test_connect_and_trace_are_refused(balancer: Balancer, backend: WireBackend, method: bytes, target: bytes) -> None:
    """Rules 11 and 12, S 9.3.6 and 9.3.8: 405 with Allow (S 15.5.6); hyper refuses TRACE with an authority itself."""
    status, lines, _ = split_response(exchange(balancer.port, get(target, method=method)))
    assert status == 405 or (status, method, target) == (400, b"TRACE", b"test:80")
    assert status == 400 or b"GET" in values(lines, b"allow")[0]
    assert backend.seen == 0


def test_options_asterisk_is_forwarded_as_it_is(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 11, M 3.2.4."""
    assert ask(balancer.port, request(b"*", method=b"OPTIONS"))[0] == 200
    assert backend.requests[0].head.startswith(b"OPTIONS * HTTP/1.1\r\n")


@pytest.mark.parametrize("method", [b"GET", b"POST", b"HEAD"])
def test_asterisk_is_for_options_only(balancer: Balancer, backend: WireBackend, method: bytes) -> None:
    """Rule 11, M 3.2.4."""
    assert split_response(exchange(balancer.port, get(b"*", method=method)))[0] == 400
    assert backend.seen == 0


def test_options_with_max_forwards_0_is_answered_here(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 12, S 7.6.2: MUST NOT be forwarded."""
    status = ask(balancer.port, request(b"/", b"Max-Forwards: 0", method=b"OPTIONS"))[0]
    assert backend.seen == 0
    assert 200 <= status < 300


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([b"Host: a", b"Host: b"], 400),
        ([], 400),
        ([b"Host: a", b"Transfer-Encoding: gzip, chunked"], 501),
    ],
)
def test_options_that_is_answered_here_is_checked_all_the_same(
    balancer: Balancer, backend: WireBackend, lines: list[bytes], status: int
) -> None:
    head = b"\r\n".join([b"OPTIONS / HTTP/1.1", b"Max-Forwards: 0", *lines, b"Connection: close", b"", b""])
    assert split_response(exchange(balancer.port, head))[0] == status
    assert backend.seen == 0


def test_the_smallest_of_several_max_forwards_counts(balancer: Balancer, backend: WireBackend) -> None:
    lines = (b"Max-Forwards: 5", b"Max-Forwards: 0")
    assert 200 <= ask(balancer.port, request(b"/", *lines, method=b"OPTIONS"))[0] < 300
    assert backend.seen == 0


def test_options_with_max_forwards_is_counted_down(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 12, S 7.6.2; other methods may leave it alone."""
    assert ask(balancer.port, request(b"/", b"Max-Forwards: 5", method=b"OPTIONS"))[0] == 200
    assert backend.requests[0].values(b"max-forwards") == [b"4"]
    assert forwarded(balancer, backend, b"Max-Forwards: 5").values(b"max-forwards") == [b"5"]


@pytest.mark.parametrize("method", [b"PATCH", b"PURGE", b"get", b"M-SEARCH", b"PROPFIND"])
def test_other_methods_pass(balancer: Balancer, backend: WireBackend, method: bytes) -> None:
    """S 9.1: a gateway does not need to know a method; names are case-sensitive."""
    assert ask(balancer.port, request(method=method))[0] == 200
    assert backend.requests[0].head.startswith(method + b" / HTTP/1.1\r\n")


# Rules 14 to 18: framing and smuggling, requests.

SMUGGLED = CHUNKED_ABC + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "lines",
    [
        [b"Content-Length: 4", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 0", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 4"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 40"],
    ],
)
def test_content_length_with_transfer_encoding(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rule 14, M 6.3, a known gap: not 400; the server in front goes by Transfer-Encoding alone and closes after it.

    RFC 9112 allows that. What counts: one request arrives, framed anew, and what follows is not taken for another.
    """
    data = exchange(balancer.port, post(*lines, body=SMUGGLED))
    assert data.count(b"HTTP/1.1 ") == 1
    (got,) = backend.requests
    assert got.body == b"abc"
    assert not got.values(b"content-length") and not backend.broken


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
def test_transfer_encoding_in_http_1_0_is_refused(balancer: Balancer, backend: WireBackend, connection: bytes) -> None:
    """Rule 15, M 6.1."""
    lines = [b"Transfer-Encoding: chunked", b"Connection: " + connection]
    data = exchange(balancer.port, request(b"/", *lines, method=b"POST", body=CHUNKED_ABC, version=b"1.0"))
    assert split_response(data)[0] == 400
    assert backend.seen == 0


BAD_CODINGS = [
    *([b"gzip"], [b"chunked, gzip"], [b"xchunked"], [b'"chunked"'], [b"\x0bchunked"], [b""], [b"chunked;q=1"]),
    *([b"gzip, chunked"], [b"chunked, chunked"], [b"chunked", b"chunked"], [b"identity", b"chunked"]),
    *([b"gzip", b"chunked"], [b"chunked", b"identity"], [b"chunked,"], [b"x, chunked"]),
]


@pytest.mark.parametrize("codings", BAD_CODINGS, ids=lambda codings: ascii(b" + ".join(codings))[2:-1])
def test_other_transfer_codings_are_refused(balancer: Balancer, backend: WireBackend, codings: list[bytes]) -> None:
    """Rule 15, M 6.1 and 6.3: anything but one `chunked` is 400 or 501 (not understood), and nothing is sent on.

    To forward `gzip, chunked` as `chunked` would change the content: the backend could not know that it is compressed.
    """
    lines = [b"Transfer-Encoding: " + coding for coding in codings]
    status = split_response(exchange(balancer.port, post(b"Connection: close", *lines, body=SMUGGLED)))[0]
    assert (status in (400, 501), backend.seen) == (True, 0)


BAD_LENGTHS = [
    *(
        [b"+3"],
        [b"-3"],
        [b"0x3"],
        [b"1_0"],
        [b"3 4"],
        [b"3, 4"],
        [b"3.0"],
        [b""],
        [b"\xb2"],
        ["\u0663".encode()],
        [b"three"],
    ),
    *([b"99999999999999999999999"], [b"18446744073709551616"], [b"3", b"4"], [b"3", b"+3"], [b"3;"], [b"\x0b3"]),
]


@pytest.mark.parametrize("lengths", BAD_LENGTHS, ids=lambda lengths: ascii(b" + ".join(lengths))[2:-1])
def test_a_malformed_content_length_is_refused(balancer: Balancer, backend: WireBackend, lengths: list[bytes]) -> None:
    """Rule 16, M 6.2 and 6.3: digits only, in bytes; and the connection is closed."""
    lines = [b"Content-Length: " + length for length in lengths]
    assert split_response(exchange(balancer.port, post(*lines, body=b"abcdefghij")))[0] == 400
    assert backend.seen == 0


@pytest.mark.parametrize("lines", [[b"Content-Length: 3", b"Content-Length: 3"], [b"Content-Length: 003"]])
def test_a_length_that_says_one_thing_is_sent_on_once(
    balancer: Balancer, backend: WireBackend, lines: list[bytes]
) -> None:
    """Rule 16, M 6.3: equal repeats may be collapsed, leading zeros are digits; what we send is our own number."""
    assert ask(balancer.port, post(*lines, body=b"abc"))[0] == 200
    assert backend.requests[0].values(b"content-length") == [b"3"]
    assert backend.requests[0].body == b"abc"


BAD_CHUNKS = {
    "plus": b"+3\r\nabc\r\n0\r\n\r\n",
    "hex prefix": b"0x3\r\nabc\r\n0\r\n\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
    "leading blank": b" 3\r\nabc\r\n0\r\n\r\n",
    "negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "no hex": b"g\r\nabc\r\n0\r\n\r\n",
    "overflow": b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    "empty": b"\r\nabc\r\n0\r\n\r\n",
    "data longer": b"3\r\nabcd\r\n0\r\n\r\n",
    "line feeds": b"3\nabc\n0\n\n",
    "carriage return": b"3\rabc\r\n0\r\n\r\n",
    "line feed in extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "carriage return in extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "huge extension": b"3;" + b"a" * 70000 + b"\r\nabc\r\n0\r\n\r\n",
    "malformed trailer": b"3\r\nabc\r\n0\r\nX T: 1\r\n\r\n",
    "huge trailer": b"3\r\nabc\r\n0\r\nX: " + b"a" * 70000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_malformed_chunks_are_refused(balancer: Balancer, backend: WireBackend, body: bytes) -> None:
    """Rules 16 and 17, M 7.1: 400 and close. The backend never sees the end of such a request."""
    data = exchange(balancer.port, post(b"Transfer-Encoding: chunked", body=body + b"GET /smuggled HTTP/1.1\r\n\r\n"))
    assert split_response(data)[0] == 400
    assert data.count(b"HTTP/1.1 ") == 1
    assert backend.requests == []


@pytest.mark.parametrize(
    "body", [CHUNKED_ABC, b'3;a=b;c="d"\r\nabc\r\n0;x\r\n\r\n', b"003\r\nabc\r\n00\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n"]
)
def test_chunks_are_decoded_and_framed_anew(balancer: Balancer, backend: WireBackend, body: bytes) -> None:
    """Rule 17, M 7.1.1: extensions and the client's own framing stop here (a blank after the size is tolerated)."""
    assert ask(balancer.port, post(b"Transfer-Encoding: cHuNkEd", body=body))[0] == 200
    (got,) = backend.requests
    assert (got.body, got.values(b"transfer-encoding")) == (b"abc", [b"chunked"])


MALFORMED_LINES = {
    "obs-fold": b"X-A: 1\r\n 2\r\n",
    "obs-fold with tab": b"X-A: 1\r\n\t2\r\n",
    "space before colon": b"X-A : 1\r\n",
    "tab before colon": b"X-A\t: 1\r\n",
    "bare CR in value": b"X-A: 1\r2\r\n",
    "bare CR in name": b"X\r-A: 1\r\n",
    "NUL": b"X-A: 1\x002\r\n",
    "control character": b"X-A: 1\x012\r\n",
    "DEL": b"X-A: 1\x7f2\r\n",
    "no colon": b"X-A\r\n",
    "empty name": b": 1\r\n",
    "delimiter in name": b"X(A): 1\r\n",
    "name not ASCII": b"X\xe9: 1\r\n",
    "hidden Transfer-Encoding": b"Transfer-Encoding : chunked\r\n",
}


@pytest.mark.parametrize("line", MALFORMED_LINES.values(), ids=MALFORMED_LINES)
def test_malformed_header_lines_are_refused(balancer: Balancer, backend: WireBackend, line: bytes) -> None:
    """Rule 18, M 2.2, 5.1, 5.2 and S 5.5: 400, closed, nothing sent."""
    data = exchange(balancer.port, b"GET / HTTP/1.1\r\nHost: test\r\n" + line + b"\r\n" + request(b"/second"))
    assert split_response(data)[0] == 400
    assert data.count(b"HTTP/1.1 ") == 1
    assert backend.seen == 0


MALFORMED_REQUEST_LINES = [
    *(
        b"GET / HTTP/1.1\r\n Host: test",
        b"GET /\r\nHost: test",
        b"GET / HTTP/2.0",
        b"GET / HTTP/1.2",
        b"GET / http/1.1",
    ),
    *(
        b"GET  / HTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET\t/ HTTP/1.1",
        b"G(T / HTTP/1.1",
        b"GET a/b HTTP/1.1",
        b" GET / HTTP/1.1",
    ),
    *(
        b"GET /\xc3\xa9 HTTP/1.1",
        b"GET /\x00 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"GET / HTTP/1.1\rX",
        b"GET / HTTP/1.1 ",
        b"/",
    ),
]


@pytest.mark.parametrize("line", MALFORMED_REQUEST_LINES, ids=lambda line: ascii(line)[2:-1])
def test_malformed_request_lines_are_refused(balancer: Balancer, backend: WireBackend, line: bytes) -> None:
    """Rules 9 and 18, M 2.2 and 3."""
    data = exchange(balancer.port, line + b"\r\nHost: test\r\nConnection: close\r\n\r\n")
    assert split_response(data)[0] == 400
    assert backend.seen == 0


def test_a_head_with_bare_line_feeds_is_understood_and_sent_on_properly(
    balancer: Balancer, backend: WireBackend
) -> None:
    """Rule 18, M 2.2, a known gap: a recipient MAY take LF for a line end; the backend gets CRLF."""
    assert exchange(balancer.port, b"GET / HTTP/1.1\nHost: test\nConnection: close\n\n").startswith(b"HTTP/1.1 200")
    assert re.search(rb"(?<!\r)\n", backend.requests[0].head) is None


def test_request_trailers_are_discarded(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 25, M 7.1.2 and S 6.5.1: never merged into the header section; and no `TE: trailers` upstream."""
    body = b"3\r\nabc\r\n0\r\nX-Trailer: 1\r\nHost: evil\r\nContent-Length: 9\r\n\r\n"
    lines = [b"Transfer-Encoding: chunked", b"TE: trailers", b"Trailer: X-Trailer"]
    assert ask(balancer.port, post(*lines, body=body))[0] == 200
    (got,) = backend.requests
    assert got.body == b"abc"
    assert got.values(b"host") == [b"test"]
    assert not got.values(b"x-trailer") + got.values(b"te") + got.values(b"trailer")


@pytest.mark.parametrize(
    "lines", [[b"Content-Length: 10"], [b"Content-Length: 100000"], [b"Transfer-Encoding: chunked"]]
)
def test_a_truncated_request_never_looks_complete(balancer: Balancer, backend: WireBackend, lines: list[bytes]) -> None:
    """Rule 19, M 8: the client stops in the middle."""
    exchange(balancer.port, post(*lines, body=b"3\r\nabc\r\n"), half_close=True)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []


# Rules 16 to 20: framing, answers.

HEAD_OK = b"HTTP/1.1 200 OK\r\n"
LENGTH_3 = b"Content-Length: 3\r\n\r\nabc"
MALFORMED_ANSWERS = {
    "length no number": HEAD_OK + b"Content-Length: x\r\n\r\nabc",
    "length +3": HEAD_OK + b"Content-Length: +3\r\n\r\nabc",
    "length 1_0": HEAD_OK + b"Content-Length: 1_0\r\n\r\n0123456789",
    "length hex": HEAD_OK + b"Content-Length: 0x3\r\n\r\nabc",
    "length negative": HEAD_OK + b"Content-Length: -3\r\n\r\nabc",
    "length empty": HEAD_OK + b"Content-Length:\r\n\r\nabc",
    "length too big": HEAD_OK + b"Content-Length: 99999999999999999999\r\n\r\nabc",
    "length list": HEAD_OK + b"Content-Length: 3, 4\r\n\r\nabc",
    "lengths differ": HEAD_OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "coding gzip": HEAD_OK + b"Transfer-Encoding: gzip\r\n\r\nabc",
    "coding gzip, chunked": HEAD_OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED_ABC,
    "coding chunked, gzip": HEAD_OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + CHUNKED_ABC,
    "coding twice": HEAD_OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC,
    "length then coding": HEAD_OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC,
    "coding then length": HEAD_OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + CHUNKED_ABC,
    "garbage": b"garbage\r\n\r\n",
    "HTTP/0.9 style": b"<html>hello</html>\r\n",
    "version 3": b"HTTP/3.0 200 OK\r\n" + LENGTH_3,
    "status 2x0": b"HTTP/1.1 2x0 OK\r\n" + LENGTH_3,
    "status of 2 digits": b"HTTP/1.1 99 OK\r\n" + LENGTH_3,
    "status of 4 digits": b"HTTP/1.1 1000 OK\r\n" + LENGTH_3,
    "status 000": b"HTTP/1.1 000 OK\r\n" + LENGTH_3,
    "CR in reason": b"HTTP/1.1 200 O\rK\r\n" + LENGTH_3,
    "NUL in value": HEAD_OK + b"X: a\x00b\r\n" + LENGTH_3,
    "control character in value": HEAD_OK + b"X: a\x01b\r\n" + LENGTH_3,
    "bare CR in value": HEAD_OK + b"X: a\rSet-Cookie: evil=1\r\n" + LENGTH_3,
    "bare LF": HEAD_OK + b"X: a\nSet-Cookie: evil=1\r\n" + LENGTH_3,
    "obs-fold": HEAD_OK + b"X: a\r\n b\r\n" + LENGTH_3,
    "blank before first line": HEAD_OK + b" X: a\r\n" + LENGTH_3,
    "space before colon": HEAD_OK + b"Content-Length : 3\r\n\r\nabc",
    "no colon": HEAD_OK + b"X\r\n" + LENGTH_3,
    "empty name": HEAD_OK + b": a\r\n" + LENGTH_3,
    "delimiter in name": HEAD_OK + b"X(: a\r\n" + LENGTH_3,
    "huge head": HEAD_OK + b"X: " + b"a" * 300_000 + b"\r\n" + LENGTH_3,
    "a large head in one piece": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "a large head of small lines": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 12_000 + b"Content-Length: 0\r\n\r\n",
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000,
    "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nx",
    "101 bare": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "chunk size garbage": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    "chunk size +3": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
    "chunk size 0x3": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "chunk size overflow": HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n0\r\n\r\n",
}


def next_peer_differs(balancer: Balancer, backend: WireBackend) -> bool:
    """True if the next request comes on a connection that no request came on so far."""
    used = set(backend.peers)
    backend.answer(ok(b"next"))
    assert ask(balancer.port, request(b"/next"))[2] == b"next"
    return backend.peers[-1] not in used


@pytest.mark.parametrize("answer", MALFORMED_ANSWERS.values(), ids=MALFORMED_ANSWERS)
def test_malformed_answers_become_502(balancer: Balancer, backend: WireBackend, answer: bytes) -> None:
    """Rules 16, 18, 19, 24 and 27, M 2.2, 5, 6.3 and 11.1: 502, nothing of it passed on, connection not used again."""
    backend.answer(answer)
    status, lines, body = ask(balancer.port, request())
    assert (status, sorted(json.loads(body))) == (502, ["error", "load_balancer_id", "request_id"])
    assert not values(lines, b"set-cookie") + values(lines, b"x")
    assert next_peer_differs(balancer, backend)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_close_before_the_head_is_complete_becomes_502(
    balancer: Balancer, backend: WireBackend, answer: bytes, reset: bool
) -> None:
    """Rule 27, S 15.6.3."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(answer)
        hang_up(sock, reset=reset)

    backend.script = script
    assert ask(balancer.port, post(b"Content-Length: 0"))[0] == 502
    assert backend.seen == 1


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC]
)
@pytest.mark.parametrize("extra", [b"more", ok(b"evil")])
def test_bytes_after_the_answer_are_dropped_and_the_connection_too(
    balancer: Balancer, backend: WireBackend, framing: bytes, extra: bytes
) -> None:
    """Rule 19, M 6.3 and 11.2: a second answer in the same packet must not be given to the next client."""
    backend.answer(HEAD_OK + framing + extra)
    assert ask(balancer.port, request())[2] == b"abc"
    assert next_peer_differs(balancer, backend)


def test_an_answer_that_comes_while_idle_is_given_to_nobody(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 19, M 11.2: bytes on an idle connection end it."""
    sent = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(ok(b"first"))
        wait_until(lambda: is_idle(balancer))
        sock.sendall(ok(b"evil"))
        sent.set()

    backend.script = script
    assert ask(balancer.port, request())[2] == b"first"
    assert sent.wait(60)
    assert next_peer_differs(balancer, backend)


@pytest.mark.parametrize(
    "answer",
    [
        HEAD_OK + b"Content-Length: 3\r\n\r\nabc",
        HEAD_OK + b"Transfer-Encoding: cHuNkEd\r\n\r\n3;ext=1\r\nabc\r\n0\r\n\r\n",
        HEAD_OK + b"Content-Length: 003\r\n\r\nabc",
        HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n3  \r\nabc\r\n0\t\r\n\r\n",
        HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n3 ;ext=1\r\nabc\r\n0\r\n\r\n",
        HEAD_OK + b"Content-Length: 3\r\nContent-Length: 03\r\n\r\nabc",
        b"\r\nHTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\nabc",
    ],
)
def test_the_connection_is_used_again_after_a_complete_answer(
    balancer: Balancer, backend: WireBackend, answer: bytes
) -> None:
    """Rules 17 and 21, M 9.3: chunk extensions of the backend are not relayed."""
    backend.answer(answer)
    status, _, body = ask(balancer.port, request())
    assert (status, body) == (200, b"abc")
    wait_until(lambda: is_idle(balancer))
    assert not next_peer_differs(balancer, backend)


@pytest.mark.parametrize(
    "answer",
    [
        HEAD_OK + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc",
        HEAD_OK + b"Connection: foo, Close\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC,
    ],
)
def test_the_connection_is_not_used_again_when_the_backend_says_so(
    balancer: Balancer, backend: WireBackend, answer: bytes
) -> None:
    """M 9.3 and 9.6; Transfer-Encoding in HTTP/1.0 is faulty framing (M 6.1)."""
    backend.answer(answer)
    assert ask(balancer.port, request())[2] == b"abc"
    assert next_peer_differs(balancer, backend)


LOGINS = [b"NTLM TlRMTVNTUAAB", b"Negotiate YII=", b"negotiate YII="]


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"POST"])
def test_a_connection_that_was_logged_in_serves_nobody_else(
    balancer: Balancer, backend: WireBackend, method: bytes, login: bytes
) -> None:
    """RFC 4559 section 6: whoever came next on it would be served as whoever logged in."""
    framing = [b"Transfer-Encoding: chunked"] if method == b"POST" else []
    body = CHUNKED_ABC if framing else b""
    data = request(b"/", b"Authorization: " + login, *framing, method=method, body=body)
    for answer in (b"HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM TlRM\r\nContent-Length: 0\r\n\r\n", ok(b"hello")):
        backend.answer(answer)
        assert ask(balancer.port, data)[0] == int(answer.split()[1])
        assert next_peer_differs(balancer, backend)


def test_a_connection_whose_answer_says_that_it_is_logged_in_serves_nobody_else(
    balancer: Balancer, backend: WireBackend
) -> None:
    backend.answer(ok(b"hello", b"Persistent-Auth: true"))
    assert ask(balancer.port, request(b"/", b"Authorization: Unheard of"))[2] == b"hello"
    assert next_peer_differs(balancer, backend)


@pytest.fixture(params=["request", "check"])
def old(start: Callable[..., Balancer], scripted: WireBackend, request: pytest.FixtureRequest) -> Balancer:
    """In front of a backend that has answered a request, or a health check, in HTTP/1.0."""
    scripted.answer(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")
    balancer = start() if request.param == "request" else start("--health-path=/check")
    if request.param == "request":
        assert ask(balancer.port, get(b"/check"))[0] == 200
    return balancer


def test_a_small_chunked_body_goes_with_its_length_to_http_1_0(old: Balancer, scripted: WireBackend) -> None:
    """M 6.1: whoever speaks HTTP/1.0 would take it for empty."""
    assert ask(old.port, post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC))[0] == 200
    (got,) = (got for got in scripted.requests if got.target != b"/check")
    assert (got.body, got.values(b"content-length"), got.values(b"transfer-encoding")) == (b"abc", [b"3"], [])


def test_a_large_chunked_body_is_refused_for_http_1_0(old: Balancer, scripted: WireBackend) -> None:
    """411 instead of a body that gets lost, and the backend is not to blame."""
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (70000, b"x" * 70000)
    status, _, told = ask(old.port, post(b"Transfer-Encoding: chunked", body=body))
    assert (status, json.loads(told)["error"]) == (411, "the request body needs a Content-Length")
    assert {got.target for got in scripted.requests} == {b"/check"} and not scripted.broken
    assert old.backend("only")["failed_requests"] == 0
    assert "HTTP/1.0" in newest(old)["tried"][0]["error"]
    assert ask(old.port, post(b"Content-Length: 70000", body=b"x" * 70000))[0] == 200


def test_response_trailers_are_discarded(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 25, S 6.5.1: not merged into the header section, also when they come late."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n3\r\nabc\r\n")
        sock.sendall(b"0\r\nX-T: 1\r\nSet-Cookie: evil=1\r\n\r\n")

    backend.script = script
    data = exchange(balancer.port, get())
    assert b"abc" in data and b"X-T" not in data and b"x-t" not in data and b"evil" not in data


def test_a_body_until_eof_is_relayed_and_framed(balancer: Balancer, backend: WireBackend) -> None:
    """M 6.3, rule 8 of it: chunked to an HTTP/1.1 client, whose connection can stay open."""
    backend.answer(HEAD_OK + b"\r\nabc", close=True)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            sock.sendall(request())
            assert read_response(stream)[2] == b"abc"


TRUNCATED = {
    "length": b"Content-Length: 10\r\n\r\nabc",
    "between chunks": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "in a chunk": b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "in the last chunk": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
    "chunk size garbage": b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n",
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("framing", TRUNCATED.values(), ids=TRUNCATED)
def test_a_truncated_answer_reaches_the_client_as_truncated(
    balancer: Balancer, backend: WireBackend, framing: bytes, late: bool
) -> None:
    """Rule 20, M 8: no last chunk, fewer bytes than announced. `late`: the client has had the first bytes before.

    What comes with the break in one packet may be lost with it; what came before must not.
    """
    reached = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        if late:
            head, _, body = framing.partition(b"\r\n\r\n")
            first = body[: body.index(b"abc") + 3]
            sock.sendall(HEAD_OK + head + b"\r\n\r\n" + first)
            assert reached.wait(60)
            sock.sendall(body[len(first) :])
        else:
            sock.sendall(HEAD_OK + framing)
        hang_up(sock)

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        if late:
            wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
            reached.set()
        try:
            status: int | None = read_response(stream)[0]
        except (Broken, ConnectionResetError):
            status = None
    assert status is None or (status == 502 and not late), "the answer looks complete"
    wait_until(lambda: is_idle(balancer))
    record = newest(balancer)
    assert record["complete"] is (status == 502)
    assert record["reason"] in ("http_response_incomplete", "http_protocol_error", "connection_terminated")


def test_a_reset_in_a_body_until_eof_is_truncation(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 20, M 8: only a proper close ends such a body."""
    reached = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"\r\nabc")
        assert reached.wait(60)
        hang_up(sock, reset=True)

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
        reached.set()
        with pytest.raises((Broken, ConnectionResetError)):
            read_response(stream)


def test_a_truncated_answer_counts_as_a_failure_of_the_backend(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 20 and the counts of /status; the client's keep-alive connection is cut."""
    before = balancer.backend("only")["failed_requests"]
    backend.answer(HEAD_OK + b"Content-Length: 10\r\n\r\nabc", close=True)
    exchange(balancer.port, request())  # returns only because the connection is closed
    wait_until(lambda: balancer.backend("only")["failed_requests"] == before + 1)


# Rule 21: messages without a body.

BODILESS = {
    "HEAD with length": (b"HEAD", HEAD_OK + b"Content-Length: 10\r\n\r\n"),
    "HEAD chunked": (b"HEAD", HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n"),
    "204": (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
    "204 with length": (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n"),
    "204 chunked": (b"GET", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "304": (b"GET", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "304 with length": (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 30\r\nETag: x\r\n\r\n"),
    "304 chunked": (b"GET", b"HTTP/1.1 304 Not Modified\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "HEAD 404": (b"HEAD", b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"),
}


@pytest.mark.parametrize(("method", "answer"), BODILESS.values(), ids=BODILESS)
def test_bodiless_answers_end_with_their_head(
    balancer: Balancer, backend: WireBackend, method: bytes, answer: bytes
) -> None:
    """Rule 21, S 8.6, 9.3.2 and M 6.1, 6.3: both connections carry the next exchange at once."""
    backend.answer(answer)
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request(method=method))
        status, lines, _ = read_response(stream, method)
        backend.answer(ok(b"next"))
        sock.sendall(request(b"/next"))
        assert read_response(stream)[2] == b"next"
    if status == 204:
        assert not values(lines, b"content-length") + values(lines, b"transfer-encoding")
    if status == 200:
        assert values(lines, b"content-length") in ([b"10"], [])
    assert backend.peers[0] == backend.peers[1]


def test_head_keeps_the_length_of_the_get(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 21, S 9.3.2."""
    backend.answer(HEAD_OK + b"Content-Length: 12345\r\n\r\n")
    data = exchange(balancer.port, get(method=b"HEAD"))
    assert values(split_response(data)[1], b"content-length") == [b"12345"]
    assert data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"HEAD", HEAD_OK + b"Content-Length: 3\r\n\r\nabc"),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\nabc"),
        (b"GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\nabc"),
    ],
)
def test_a_body_where_none_may_be_is_dropped_with_the_connection(
    balancer: Balancer, backend: WireBackend, method: bytes, answer: bytes
) -> None:
    """Rules 19 and 21, M 6.3."""
    backend.answer(answer)
    assert exchange(balancer.port, get(method=method)).endswith(b"\r\n\r\n")
    assert next_peer_differs(balancer, backend)


def test_a_head_answer_without_length_leaves_the_connection_usable(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 21, M 6.3: the answer to HEAD ends with its head whatever its fields say."""
    backend.answer(HEAD_OK + b"X: 1\r\n\r\n")
    assert ask(balancer.port, request(method=b"HEAD"), b"HEAD")[0] == 200
    assert not next_peer_differs(balancer, backend)


# Rules 22 and 23: interim answers and Expect.


@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\nSet-Cookie: evil=1\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 3,
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_interim_answers_are_swallowed(balancer: Balancer, backend: WireBackend, interim: bytes, apart: bool) -> None:
    """Rule 22, S 15.2, a known gap: WSGI cannot send 103. Its fields must not get into the final answer."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in [interim, ok(b"final")] if apart else [interim + ok(b"final")]:
            sock.sendall(piece)

    backend.script = script
    data = exchange(balancer.port, get())
    status, lines, body = split_response(data)
    assert (status, body) == (200, b"final")
    assert not values(lines, b"link") + values(lines, b"set-cookie")
    wait_until(lambda: is_idle(balancer))
    assert not next_peer_differs(balancer, backend)


def test_expect_continue_is_answered_here(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 23, S 10.1.1: terminated; the backend gets no Expect and the body."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Expect: 100-continue", b"Content-Length: 3"))
        assert stream.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert backend.requests == []
        sock.sendall(b"abc")
        assert stream.readline() == b"\r\n"
        assert read_response(stream)[0] == 200
    assert backend.requests[0].body == b"abc"
    assert not backend.requests[0].values(b"expect")


def test_expect_is_ignored_in_http_1_0(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 23, S 10.1.1: an HTTP/1.0 client gets no interim answer."""
    lines = [b"Expect: 100-continue", b"Content-Length: 3"]
    data = exchange(balancer.port, request(b"/", *lines, method=b"POST", body=b"abc", version=b"1.0"))
    assert data.startswith(b"HTTP/1.0 200")
    assert backend.requests[0].body == b"abc"


def test_a_refusal_comes_instead_of_100_continue(balancer: Balancer, backend: WireBackend) -> None:
    """Rules 23 and 27, S 10.1.1 and 15.5.14: no body is asked for that will not be read, and the connection closes."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Expect: 100-continue", b"Content-Length: 1000001"))
        assert stream.readline().startswith(b"HTTP/1.1 413 ")
        stream.read()
    assert backend.seen == 0


def test_another_expectation_is_dropped(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 23, S 10.1.1: MAY be refused with 417, here it is ignored."""
    assert ask(balancer.port, post(b"Expect: 200-ok", b"Content-Length: 3", body=b"abc"))[0] == 200
    assert not backend.requests[0].values(b"expect")


# Rule 24: upgrades.


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"TLS/1.0"])
def test_upgrade_is_ignored(balancer: Balancer, backend: WireBackend, protocol: bytes) -> None:
    """Rule 24, S 7.8: MAY be ignored; neither field reaches the backend, so no tunnel can be smuggled (h2c)."""
    lines = [
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: " + protocol,
        b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
    ]
    got = forwarded(balancer, backend, *lines)
    assert not got.values(b"upgrade") + got.values(b"connection") + got.values(b"http2-settings")


# Rule 26: retries.


def retries_of(balancer: Balancer) -> int:
    count: int = balancer.status()["statistics"]["retries"]
    return count


def once_refusing(*, reset: bool) -> Callable[[socket.socket, Any], None]:
    """A script for both backends: whoever gets the first request hangs up, everything after that is answered."""
    first = iter([True])

    def script(sock: socket.socket, _: Any) -> None:
        if next(first, False):
            hang_up(sock, reset=reset)
        sock.sendall(ok(b"second try"))

    return script


IDEMPOTENT = [
    request(),
    request(method=b"HEAD"),
    request(method=b"OPTIONS"),
    request(method=b"DELETE"),
    request(b"/", b"Content-Length: 3", method=b"PUT", body=b"abc"),
    request(b"/", b"Content-Length: 3", body=b"abc"),
]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("data", IDEMPOTENT, ids=lambda data: ascii(data[:7])[2:-1])
def test_an_idempotent_request_goes_to_another_backend(pair: Pair, data: bytes, reset: bool) -> None:
    """Rule 26, S 9.2.2: broken off before the head; both attempts are recorded, one retry is counted."""
    pair.script(once_refusing(reset=reset))
    before = retries_of(pair.balancer)
    method = data.split(b" ")[0]
    assert ask(pair.port, data, method)[0] == 200
    assert [len(backend.requests) for backend in pair.backends.values()] == [1, 1]
    assert pair.requests[0].body == pair.requests[1].body
    assert len({got.values(b"x-request-id")[0] for got in pair.requests}) == 1
    record = newest(pair.balancer)
    assert record["attempts"] == 2
    assert {attempt["backend"] for attempt in record["tried"]} == {"a", "b"}
    assert retries_of(pair.balancer) == before + 1


NOT_REPEATABLE = [
    post(b"Content-Length: 3", body=b"abc"),
    request(b"/", b"Content-Length: 3", method=b"PATCH", body=b"abc"),
    request(b"/", method=b"FOO"),
    request(b"/", b"Transfer-Encoding: chunked", method=b"PUT", body=CHUNKED_ABC),
    request(b"/", b"Content-Length: 200000", method=b"PUT", body=b"x" * 200_000),
]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("data", NOT_REPEATABLE, ids=["POST", "PATCH", "FOO", "PUT chunked", "PUT large"])
def test_other_requests_are_never_sent_twice(pair: Pair, data: bytes, reset: bool) -> None:
    """Rule 26, S 9.2.2: not idempotent, or a body that is gone after the first try. 502, one try."""
    pair.script(once_refusing(reset=reset))
    assert ask(pair.port, data)[0] == 502
    assert pair.seen == 1
    assert newest(pair.balancer)["attempts"] == 1


def test_a_bad_answer_to_get_is_retried_elsewhere(pair: Pair) -> None:
    """Rule 26 and design 6: what is no HTTP counts as no answer."""
    answers = iter([b"garbage\r\n\r\n", ok(b"good")])
    pair.script(lambda sock, _: sock.sendall(next(answers)))
    assert ask(pair.port, request())[2] == b"good"
    assert pair.seen == 2


def test_a_bad_answer_to_post_is_not_retried(pair: Pair) -> None:
    """Rule 26."""
    pair.script(lambda sock, _: sock.sendall(b"garbage\r\n\r\n"))
    assert ask(pair.port, post(b"Content-Length: 3", body=b"abc"))[0] == 502
    assert pair.seen == 1


@pytest.mark.parametrize("status", [b"500 X", b"502 X", b"503 X", b"504 X", b"404 X", b"429 X"])
def test_statuses_of_the_backend_are_answers_not_failures(pair: Pair, status: bytes) -> None:
    """Rule 27: passed on unchanged, not retried, with body and fields."""
    pair.script(
        lambda sock, _: sock.sendall(b"HTTP/1.1 " + status + b"\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc")
    )
    got, lines, body = ask(pair.port, request())
    assert (b"%d X" % got, body, values(lines, b"retry-after")) == (status, b"abc", [b"7"])
    assert pair.seen == 1


def test_every_backend_is_tried_once_at_most(pair: Pair) -> None:
    """Rule 26: a failed retry is not retried on the same backend; 502 with the last cause."""
    pair.script(lambda sock, _: hang_up(sock))
    assert ask(pair.port, request())[0] == 502
    assert [backend.seen for backend in pair.backends.values()] == [1, 1]
    assert newest(pair.balancer)["reason"] == "connection_terminated"


def test_a_retry_that_finds_no_other_backend_is_not_counted(balancer: Balancer, backend: WireBackend) -> None:
    """Statistics: `retries` are further attempts that were made; with one backend there are none."""
    before = retries_of(balancer)
    backend.answer(b"garbage\r\n\r\n")
    assert ask(balancer.port, request())[0] == 502
    assert (newest(balancer)["attempts"], retries_of(balancer)) == (1, before)


@pytest.mark.parametrize(
    "data",
    [request(), post(b"Content-Length: 3", body=b"abc"), post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC)],
    ids=["GET", "POST", "POST chunked"],
)
def test_a_refused_connect_is_retried_for_any_method(data: bytes) -> None:
    """Rule 26: nothing was sent. The checks are an hour apart here, so that only the data path can notice."""
    gone, alive = WireBackend(), WireBackend()
    balancer = Balancer(
        f"--backend=gone={gone.url}",
        f"--backend=alive={alive.url}",
        "--algorithm=round_robin",
        "--health-interval=3600",
    )
    try:
        gone.close()
        assert ask(balancer.port, data)[0] == ask(balancer.port, data)[0] == 200
        assert alive.seen == 2
        assert sorted(record["attempts"] for record in balancer.status()["recent_requests"]) == [1, 2]
        assert balancer.backend("gone")["healthy"] is False
        assert [backend["failed_requests"] for backend in balancer.status()["backend_servers"]] == [0, 0]
    finally:
        balancer.stop()
        alive.close()


def warm_up(balancer: Balancer, backend: WireBackend) -> None:
    """Leave one idle connection in the pool, the only one, of which no POST is afraid however busy this machine is."""
    balancer.library.adapter._servers.at(Origin.parse(backend.url)).safe_idle = 60
    assert ask(balancer.port, request(b"/warm-up"))[0] == 200
    wait_until(lambda: is_idle(balancer))


def stale_once(backend: WireBackend, *, reset: bool) -> None:
    """From now on the connection that is pooled dies on its next request; fresh ones work."""
    pooled = set(backend.peers)

    def script(sock: socket.socket, _: Any) -> None:
        if sock.getpeername()[1] in pooled:
            hang_up(sock, reset=reset)
        sock.sendall(ok(b"fresh"))

    backend.script = script


@pytest.mark.parametrize("reset", [False, True])
def test_a_get_on_a_stale_connection_gets_one_fresh_try(balancer: Balancer, backend: WireBackend, reset: bool) -> None:
    """Rule 26, M 9.3.1: died before any byte came back; no failure of the backend, no retry counted."""
    warm_up(balancer, backend)
    before = retries_of(balancer)
    stale_once(backend, reset=reset)
    assert ask(balancer.port, request())[2] == b"fresh"
    assert backend.seen == 3
    assert (newest(balancer)["attempts"], retries_of(balancer), failures_of(balancer)) == (1, before, 0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("framing", [b"Content-Length: 3", b"Transfer-Encoding: chunked"])
def test_a_post_on_a_stale_connection_is_not_sent_again(
    balancer: Balancer, backend: WireBackend, framing: bytes, reset: bool
) -> None:
    """Rule 26, S 9.2.2: it may have been carried out."""
    warm_up(balancer, backend)
    stale_once(backend, reset=reset)
    assert ask(balancer.port, post(framing, body=CHUNKED_ABC if b"chunked" in framing else b"abc"))[0] == 502
    assert backend.seen == 2


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_closed_while_idle_is_not_used(balancer: Balancer, backend: WireBackend, reset: bool) -> None:
    """Rule 26: EOF is seen before reuse, so even POST is safe."""

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(ok(b"first"))
        wait_until(lambda: is_idle(balancer))
        hang_up(sock, reset=reset)

    backend.script = script
    assert ask(balancer.port, request())[2] == b"first"
    wait_until(lambda: not backend.used, what="the backend has closed its side")
    backend.answer(ok(b"second"))
    assert ask(balancer.port, post(b"Content-Length: 3", body=b"abc"))[2] == b"second"
    assert backend.seen == 2


# Rules 27 and 28: statuses, limits, time.


def assert_own_error(parsed: Parsed, status: int) -> None:
    got, lines, body = parsed
    answer = json.loads(body)
    assert (got, values(lines, b"content-type")) == (status, [b"application/json"])
    assert sorted(answer) == ["error", "load_balancer_id", "request_id"]
    assert answer["load_balancer_id"] == "lb-1" and answer["error"]
    assert values(lines, b"x-request-id") == [answer["request_id"].encode()]


def test_no_backend_is_503_with_retry_after(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, S 15.6.4."""
    backend.is_healthy = False
    balancer.wait_healthy("only", False)
    parsed = ask(balancer.port, request())
    assert_own_error(parsed, 503)
    assert int(values(parsed[1], b"retry-after")[0]) > 0
    assert backend.seen == 0
    assert newest(balancer)["server_id"] is None


def test_own_502_says_why_but_has_no_retry_after(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27 and 28: JSON; Proxy-Status is not sent unless asked for."""
    backend.answer(b"garbage\r\n\r\n")
    parsed = ask(balancer.port, request())
    assert_own_error(parsed, 502)
    assert not values(parsed[1], b"retry-after") + values(parsed[1], b"proxy-status")


def test_head_gets_no_body_with_our_errors(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 21, S 9.3.2, for answers of the balancer itself."""
    backend.answer(b"garbage\r\n\r\n")
    data = exchange(balancer.port, get(method=b"HEAD"))
    assert data.startswith(b"HTTP/1.1 502 ") and data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("data", [request(), post(b"Content-Length: 3", body=b"abc")], ids=["GET", "POST"])
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_no_answer_in_time_is_504(balancer: Balancer, backend: WireBackend, data: bytes, answer: bytes) -> None:
    """Rule 27, S 15.6.5: nothing, half a head, or only an interim answer; the backend's connection is closed."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(answer)
        if wait_closed(sock):
            closed.set()

    backend.script = script
    assert_own_error(ask(balancer.port, data), 504)
    assert closed.wait(60)
    assert newest(balancer)["reason"] == "http_response_timeout"


def test_a_head_that_trickles_is_504_too(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27: the limit is for the whole head, not between two bytes of it."""
    pause = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"X: ")
        while not pause.wait(0.05):
            sock.sendall(b"a")

    backend.script = script
    try:
        assert_own_error(ask(balancer.port, request()), 504)
    finally:
        pause.set()


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 9\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"\r\nabc"]
)
def test_a_body_that_stalls_is_cut(balancer: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 20 and 27, `idle_timeout`: cut, both sides, without a proper end."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + framing)
        if wait_closed(sock):
            closed.set()

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        with pytest.raises((Broken, ConnectionResetError)):
            read_response(stream)
    assert closed.wait(60)
    assert newest(balancer)["complete"] is False


def test_413_by_content_length_before_the_body_is_sent(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, S 15.5.14 and rule 19: the answer comes without the body, then the connection is closed."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: 1000001"))
        assert_own_error(read_response(stream), 413)
        assert wait_closed(sock), "a connection with an unread body must not be kept"
    assert backend.seen == 0


def test_413_in_the_middle_of_a_chunked_body(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27: the backend never sees the end of it."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Transfer-Encoding: chunked"))
        with suppress(OSError):
            for _ in range(20):
                sock.sendall(b"%x\r\n%s\r\n" % (65536, b"a" * 65536))
        assert_own_error(read_response(stream), 413)
        assert wait_closed(sock)
    wait_until(lambda: is_idle(balancer))
    assert backend.requests == []
    assert failures_of(balancer) == 0


def test_the_largest_body_that_is_allowed_passes(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27: a million bytes in either framing."""
    body = b"x" * 1_000_000
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    assert ask(balancer.port, post(b"Content-Length: 1000000", body=body))[0] == 200
    assert ask(balancer.port, post(b"Transfer-Encoding: chunked", body=chunked))[0] == 200
    assert [len(got.body) for got in backend.requests] == [1_000_000] * 2


@pytest.mark.parametrize(
    "data", [get(b"/", b"X: " + b"a" * 20_000), get(b"/", *[b"X: a"] * 3000)], ids=["long", "many"]
)
def test_431_for_a_large_head(balancer: Balancer, backend: WireBackend, data: bytes) -> None:
    """Rule 27, RFC 6585 section 5."""
    assert exchange(balancer.port, data).startswith(b"HTTP/1.1 431 ")
    assert backend.seen == 0


def test_414_for_a_long_target(pair: Pair) -> None:
    """Rule 27, S 15.5.15. Where `max_header_bytes` is smaller than the target, the answer is 431 instead."""
    assert exchange(pair.port, get(b"/" + b"a" * 70_000)).startswith(b"HTTP/1.1 414 ")
    assert ask(pair.port, request(b"/" + b"a" * 60_000))[0] == 200
    assert pair.seen == 1


def test_431_comes_first_if_the_head_is_limited_below_the_target(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, a known gap: 431 stands in for 414."""
    assert exchange(balancer.port, get(b"/" + b"a" * 20_000)).startswith(b"HTTP/1.1 431 ")
    assert backend.seen == 0


@pytest.mark.parametrize("data", [b"GET", b"GET / HTTP/1.1\r\nHost: t"], ids=["part", "no end"])
def test_a_slow_head_is_cut_off(balancer: Balancer, backend: WireBackend, data: bytes) -> None:
    """Rule 27, `header_timeout`: closed, with 408 or without a word (the server in front says nothing)."""
    answer = exchange(balancer.port, data)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert backend.seen == 0


@pytest.mark.parametrize("data", [b"", b"PRI * HTTP/2"], ids=["nothing", "part of the HTTP/2 preface"])
def test_a_connection_that_says_next_to_nothing_is_closed(
    balancer: Balancer, backend: WireBackend, data: bytes
) -> None:
    """Rule 27, `header_timeout`: or anyone could hold all of `max_clients` connections for ever, for free."""
    with connect(balancer.port) as sock:
        sock.sendall(data)
        assert wait_closed(sock, 8)


@pytest.mark.parametrize("framing", [b"Content-Length: 10", b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
def test_a_request_body_that_stalls_is_408_and_closed(balancer: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 19 and 27, S 15.5.9: the client is at fault, and an unread body must not keep its connection open."""
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(framing, body=b"3\r\nabc\r\n"))
        status = read_response(stream)[0]
        assert wait_closed(sock, 9), "the connection stays open for a body that never comes"
    wait_until(lambda: is_idle(balancer))
    assert (status, backend.requests, failures_of(balancer)) == (408, [], 0)


# X-Request-ID and X-Served-By.


@pytest.mark.parametrize("sane", [b"abc-123", b"a" * 128, b"0af7651916cd43dd8448eb211c80319c", b"A.b_c:d+/=@"])
def test_a_sane_request_id_is_kept(balancer: Balancer, backend: WireBackend, sane: bytes) -> None:
    """Design 3: one id from the client to the backend and back."""
    _, lines, _ = ask(balancer.port, request(b"/", b"X-Request-ID: " + sane))
    assert values(lines, b"x-request-id") == backend.requests[0].values(b"x-request-id") == [sane]
    assert newest(balancer)["request_id"] == sane.decode()


@pytest.mark.parametrize(
    "bad", [[b""], [b"a b"], [b"a" * 129], [b"<script>"], [b'"x"'], [b"caf\xe9"], [b"a", b"b"], [b"a,b"]]
)
def test_a_bad_request_id_is_replaced(balancer: Balancer, backend: WireBackend, bad: list[bytes]) -> None:
    """Design 3: it goes into logs and pages."""
    _, lines, _ = ask(balancer.port, request(b"/", *(b"X-Request-ID: " + value for value in bad)))
    (given,) = values(lines, b"x-request-id")
    assert backend.requests[0].values(b"x-request-id") == [given]
    assert re.fullmatch(rb"[0-9a-f-]{8,40}", given) and given not in bad


def test_request_ids_differ_and_the_backends_own_is_not_passed(balancer: Balancer, backend: WireBackend) -> None:
    """Design 3."""
    backend.answer(ok(b"ok", b"X-Request-ID: from-backend"))
    ids = [values(ask(balancer.port, request())[1], b"x-request-id") for _ in range(3)]
    assert [len(found) for found in ids] == [1, 1, 1]
    assert len({found[0] for found in ids} | {b"from-backend"}) == 4


def test_served_by_is_not_there_by_default(balancer: Balancer, backend: WireBackend) -> None:
    """Design 3: it tells the topology; nor is the backend's own passed on."""
    assert not values(returned(balancer, backend, b"X-Served-By: inner"), b"x-served-by")


def test_served_by_names_the_backend_if_asked_for(pair: Pair) -> None:
    """Design 3, `expose_backend`."""
    names = [values(ask(pair.port, request())[1], b"x-served-by") for _ in range(4)]
    assert sorted(names) == [[b"a"], [b"a"], [b"b"], [b"b"]]


def test_cookies_of_one_client_are_not_sent_for_another(balancer: Balancer, backend: WireBackend) -> None:
    """Python traps: a session's cookie jar would do it."""
    backend.answer(ok(b"ok", b"Set-Cookie: session=secret; Path=/"))
    ask(balancer.port, request())
    assert not forwarded(balancer, backend).values(b"cookie")


def test_redirects_are_passed_on_not_followed(balancer: Balancer, backend: WireBackend) -> None:
    """Python traps."""
    backend.answer(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 0\r\n\r\n")
    status, lines, _ = ask(balancer.port, request())
    assert (status, values(lines, b"location")) == (302, [b"http://elsewhere.example/"])
    assert backend.seen == 1


# Connections of clients.


def test_client_connections_are_kept_alive(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.3: requests of all framings one after another, up to one that is malformed."""
    chunked = post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC)
    messages = [request(), post(b"Content-Length: 3", body=b"abc"), chunked, request(), request(b"*")]
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        statuses = []
        for message in messages:
            sock.sendall(message)
            statuses.append(read_response(stream)[0])
    assert statuses == [200, 200, 200, 200, 400]
    assert backend.seen == 4


def test_pipelined_requests_are_answered_in_order(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.3.2."""
    backend.script = lambda sock, got: sock.sendall(ok(got.target + got.body))
    messages = [request(b"/1"), post(b"Content-Length: 3", body=b"abc", target=b"/2"), request(b"/3"), request(b"/4")]
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(b"".join(messages))
        assert [read_response(stream)[2] for _ in messages] == [b"/1", b"/2abc", b"/3", b"/4"]


def test_connection_close_is_honoured(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.6: nothing after it is read as a request."""
    data = exchange(balancer.port, get() + request(b"/second"))
    assert data.count(b"HTTP/1.1 200") == 1
    assert values(split_response(data)[1], b"connection") == [b"close"]
    assert backend.seen == 1


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED_ABC]
)
@pytest.mark.parametrize("keep", [False, True])
def test_http_1_0_clients_get_no_chunks(balancer: Balancer, backend: WireBackend, framing: bytes, keep: bool) -> None:
    """Rule 17, M 6.1 and 9.3: closed after the answer unless keep-alive was asked for and a length is known."""

    def script(sock: socket.socket, _: Any) -> None:
        head, _, body = framing.partition(b"\r\n\r\n")
        sock.sendall(HEAD_OK + head + b"\r\n\r\n")
        sock.sendall(body)

    backend.script = script
    lines = [b"Connection: keep-alive"] if keep else []
    status, got, body = split_response(exchange(balancer.port, request(b"/", *lines, version=b"1.0")))
    assert (status, body) == (200, b"abc")
    assert not values(got, b"transfer-encoding")


# Streaming.


def test_events_arrive_one_by_one(balancer: Balancer, backend: WireBackend) -> None:
    """The head before any body, then each event before the next is sent."""
    go = threading.Semaphore(0)
    events = [b"data: 1\n\n", b"data: 2\n\n"]

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for event in events:
            assert go.acquire(timeout=60)
            sock.sendall(b"%x\r\n%s\r\n" % (len(event), event))
        assert go.acquire(timeout=60)
        sock.sendall(b"0\r\n\r\n")

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        assert stream.readline() == b"HTTP/1.1 200 OK\r\n"
        while stream.readline() != b"\r\n":
            pass
        for event in events:
            go.release()
            assert stream.readline() == b"%x\r\n" % len(event)
            assert stream.read(len(event) + 2) == event + b"\r\n"
        go.release()
        assert stream.read(5) == b"0\r\n\r\n"


def test_a_request_body_is_streamed_too(balancer: Balancer, backend: WireBackend) -> None:
    """The backend gets the first chunk before the client sends the second."""
    first = threading.Event()

    def on_head(sock: socket.socket, got: Any) -> bool:
        first.set()
        return False

    backend.on_head = on_head
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n"))
        assert first.wait()
        sock.sendall(b"3\r\ndef\r\n0\r\n\r\n")
        assert read_response(stream)[0] == 200
    assert backend.requests[0].body == b"abcdef"


def test_an_answer_before_the_end_of_the_request_is_relayed(pair: Pair) -> None:
    """Rule 19: an early 413 of the backend reaches the client, the upload is not read to its end, nothing is pooled."""
    refused = threading.Event()
    lingering = threading.Event()

    def on_head(sock: socket.socket, _: Any) -> bool:
        sock.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntoo big")
        refused.set()
        lingering.wait(60)  # not reading, not closing: the balancer must act on the answer alone
        return True

    pair.on_head(on_head)
    with connect(pair.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: %d" % (64 * MIB)))
        sender = threading.Thread(target=pour, args=(sock, 64 * MIB))
        sender.start()
        try:
            assert refused.wait(60)
            status, _, body = read_response(stream)
        finally:
            lingering.set()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sender.join(60)
    assert (status, body) == (413, b"too big")
    wait_until(lambda: is_idle(pair.balancer))


def pour(sock: socket.socket, size: int) -> int:
    """Send `size` bytes or until the other side has had enough; returns how many."""
    piece, sent = b"x" * 65536, 0
    with suppress(OSError):
        while sent < size:
            sent += sock.send(piece[: size - sent])
    return sent


def test_a_slow_client_holds_the_backend_back(pair: Pair) -> None:
    """Back-pressure: while the client does not read, the backend is not read either, and memory stays flat."""
    size = 96 * MIB
    sent = [0]

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: %d\r\n\r\n" % size)
        piece = b"y" * 65536
        while sent[0] < size:
            sent[0] += sock.send(piece)

    pair.script(script)
    before = resident_bytes(pair.balancer.pid)
    with connect(pair.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        assert wait_until(standstill(sent)) < 48 * MIB  # what the kernel's buffers of two connections hold
        assert resident_bytes(pair.balancer.pid) - before < 16 * MIB
        assert hashlib.sha256(read_response(stream)[2]).digest() == hashlib.sha256(b"y" * size).digest()


def standstill(counter: list[int]) -> Callable[[], int]:
    """A condition: the count, once it is above 0 and has not moved for half a second."""
    before, since = 0, time.monotonic()

    def look() -> int:
        nonlocal before, since
        if counter[0] != before:
            before, since = counter[0], time.monotonic()
        return before if time.monotonic() - since > 0.5 else 0

    return look


def test_a_slow_backend_holds_the_client_back(pair: Pair) -> None:
    """Back-pressure the other way: an upload is not taken in faster than the backend reads it."""
    go = threading.Event()

    def on_head(sock: socket.socket, _: Any) -> bool:
        go.wait(60)
        return False

    pair.on_head(on_head)
    sent = [0]

    def send(sock: socket.socket) -> None:
        piece = b"x" * 65536
        while sent[0] < 96 * MIB:
            sent[0] += sock.send(piece)

    before = resident_bytes(pair.balancer.pid)
    with connect(pair.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(post(b"Content-Length: %d" % (96 * MIB)))
        sender = threading.Thread(target=send, args=(sock,))
        sender.start()
        try:
            assert wait_until(standstill(sent)) < 48 * MIB
            assert resident_bytes(pair.balancer.pid) - before < 16 * MIB
        finally:
            go.set()
        assert read_response(stream)[0] == 200
        sender.join(60)
    assert pair.requests[0].body == b"x" * (96 * MIB)


def test_a_client_that_reads_nothing_is_cut_off(balancer: Balancer, backend: WireBackend) -> None:
    """`idle_timeout` towards the client: the backend's connection is freed, and the backend is not to blame."""
    done = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: %d\r\n\r\n" % (96 * MIB))
        pour(sock, 96 * MIB)
        done.set()

    backend.script = script
    with connect(balancer.port) as sock:
        sock.sendall(request())
        assert done.wait(60)
        wait_until(lambda: is_idle(balancer))
    assert newest(balancer)["status"] == 499
    assert failures_of(balancer) == 0


# Clients that leave.


def assert_client_gone(balancer: Balancer, backend_id: str = "only") -> None:
    """Recorded as 499, nothing left behind, no fault of the backend."""
    wait_until(lambda: is_idle(balancer), what="nothing is in flight")
    record = newest(balancer)
    assert (record["status"], record["reason"], record["complete"]) == (499, "client_gone", False)
    backend = balancer.backend(backend_id)
    assert backend["healthy"] is True and backend["health"]["consecutive_failures"] == 0


LEAVING = {
    "GET": request(),
    "POST": post(b"Content-Length: 3", body=b"abc"),
    "POST large": post(b"Content-Length: 200000", body=b"x" * 200_000),
    "POST chunked": post(b"Transfer-Encoding: chunked", body=CHUNKED_ABC),
}


@pytest.mark.parametrize("data", LEAVING.values(), ids=LEAVING)
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_while_the_backend_works(
    patient: Balancer, backend: WireBackend, data: bytes, reset: bool
) -> None:
    """Rule 27: the backend connection is closed at once, by no time-out; 499."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        if wait_closed(sock):
            closed.set()

    backend.script = script
    before = patient.backend("only")["aborted_requests"]
    with connect(patient.port) as sock:
        sock.sendall(data)
        wait_until(lambda: backend.requests)
        if reset:
            with suppress(ConnectionAbortedError):
                hang_up(sock, reset=True)
    assert closed.wait(60)
    assert_client_gone(patient)
    assert patient.backend("only")["aborted_requests"] == before + 1
    assert backend.seen == 1, "a request whose client has left is not retried"


def test_a_client_that_leaves_during_the_answer(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 27, an endless answer: the backend's next sends fail."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                sock.sendall(b"3\r\nabc\r\n")
        except OSError:
            closed.set()
            raise

    backend.script = script
    with connect(balancer.port) as sock:
        sock.sendall(request())
        assert b"abc" in wait_until(lambda: sock.recv(65536))
    assert closed.wait(60)
    assert_client_gone(balancer)


def test_a_client_that_leaves_a_quiet_stream(patient: Balancer, backend: WireBackend) -> None:
    """Rule 27, an event stream in which nothing happens: noticed at once all the same."""
    closed = threading.Event()

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        if wait_closed(sock):
            closed.set()

    backend.script = script
    with connect(patient.port) as sock:
        sock.sendall(request())
        wait_until(lambda: b"abc" in sock.recv(65536, socket.MSG_PEEK))
    assert closed.wait(60)
    assert_client_gone(patient)


@pytest.mark.parametrize("framing", [b"Content-Length: 900000", b"Transfer-Encoding: chunked"])
def test_a_client_that_leaves_during_its_upload(balancer: Balancer, backend: WireBackend, framing: bytes) -> None:
    """Rules 19 and 27: the backend sees that the request is not complete."""
    with connect(balancer.port) as sock:
        sock.sendall(post(framing, body=b"30d40\r\n" + b"x" * 200_000 + b"\r\n"))
        wait_until(lambda: balancer.backend("only")["active_connections"])
    wait_until(lambda: backend.broken, what="the backend's connection is closed")
    assert_client_gone(balancer)
    assert backend.requests == []


def test_a_client_that_half_closes_counts_as_gone(balancer: Balancer, backend: WireBackend) -> None:
    """M 9.6, a known gap: hyper takes a half-closed connection for a client that has left, as nginx does by default."""
    backend.script = lambda sock, _: wait_closed(sock, 5) or sock.sendall(ok())
    exchange(balancer.port, request(), half_close=True)
    wait_until(lambda: is_idle(balancer))
    assert newest(balancer)["status"] == 499


def test_chunks_of_an_answer_are_framed_by_us(balancer: Balancer, backend: WireBackend) -> None:
    """Rule 17: the client sees valid chunks whatever sizes the backend used."""

    has_begun = threading.Event()  # an answer that is here whole at once goes on whole, with its length

    def script(sock: socket.socket, _: Any) -> None:
        sock.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for number in range(50):
            sock.sendall(b"%x;n=%d\r\n%s\r\n" % (number + 1, number, b"z" * (number + 1)))
        has_begun.wait(60)
        sock.sendall(b"0;last\r\n\r\n")

    backend.script = script
    with connect(balancer.port) as sock, sock.makefile("rb") as stream:
        sock.sendall(request())
        while stream.readline() != b"\r\n":
            pass
        has_begun.set()
        assert read_chunks(stream) == b"z" * sum(range(51))

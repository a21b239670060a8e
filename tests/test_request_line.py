"""Method, target, version and Host of a request; RFC 9110 is "S", RFC 9112 "M"."""

from __future__ import annotations

import re

import pytest
from support import Balancer, exchange, get, split_response
from wire import WireBackend, ask, forwarded, request, values


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


# Rules 9 and 18, M 2.2, 3 and 3.2.
REFUSED = [
    *(b"GET / HTTP/1.1\r\n Host: test", b"GET /\r\nHost: test", b"GET / HTTP/2.0", b"GET / HTTP/1.2", b"/"),
    *(b"GET  / HTTP/1.1", b"GET /a b HTTP/1.1", b"GET\t/ HTTP/1.1", b"G(T / HTTP/1.1", b"GET a/b HTTP/1.1"),
    *(b"GET /\xc3\xa9 HTTP/1.1", b"GET /\x00 HTTP/1.1", b"GET /\x7f HTTP/1.1", b"GET / HTTP/1.1\rX"),
    *(
        b" GET / HTTP/1.1",
        b"GET / http/1.1",
        b"GET / HTTP/1.1 ",
        b"GET * HTTP/1.1",
        b"POST * HTTP/1.1",
        b"HEAD * HTTP/1.1",
    ),
]
BAD_HOSTS = [
    *(b"", b"a b", b"a\r\nHost: a", b"a\r\nhOST: b", b"a\r\nHost: "),
    *b'user@host a/b a:80:90 [::1 a\\b a:x a:800000 a?b a#b <a> "a"'.split(),
]
HOST_LINES = [b"X: no Host", b"Host : a", b"Host_: a", *(b"Host: " + host for host in BAD_HOSTS)]
HEADS = [*(line + b"\r\nHost: test" for line in REFUSED), *(b"GET / HTTP/1.1\r\n" + line for line in HOST_LINES)]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: ascii(head)[2:-1])
def test_a_malformed_request_line_or_host_is_refused(balancer: Balancer, backend: WireBackend, head: bytes) -> None:
    data = exchange(balancer.port, head + b"\r\nConnection: close\r\n\r\n")
    assert split_response(data)[0] == 400
    assert backend.seen == 0


@pytest.mark.parametrize(
    "host", [b"test", b"TeSt.Example:8080", b"127.0.0.1:9000", b"[::1]:80", b"xn--bcher-kva.example"]
)
def test_the_clients_host_is_kept(balancer: Balancer, backend: WireBackend, host: bytes) -> None:
    """Rule 13."""
    assert split_response(exchange(balancer.port, get(host=host)))[0] == 200
    assert backend.requests[0].values(b"host") == [host]


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


@pytest.mark.parametrize("line", [b"", b"Host:\r\n"], ids=["none", "empty"])
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS"])
def test_http_1_0_needs_no_host(balancer: Balancer, backend: WireBackend, method: bytes, line: bytes) -> None:
    """Rule 9, M 3.2: required in 1.1 only; what we send has the backend's, first, and no claim of another one."""
    assert exchange(balancer.port, method + b" / HTTP/1.0\r\n" + line + b"\r\n").startswith(b"HTTP/1.0 200")
    got = backend.requests[0]
    assert got.lines[0] == (b"host", b"127.0.0.1:%d" % backend.port)
    assert not got.values(b"x-forwarded-host")


@pytest.mark.parametrize("host", [b"test", b"other"])
def test_absolute_form_becomes_origin_form(balancer: Balancer, backend: WireBackend, host: bytes) -> None:
    """Rule 10, M 3.2.2. A known gap: the URI's host should win, but the server in front does not hand it on.

    One host only reaches the backend, so there is no confusion behind us.
    """
    got = forwarded(balancer, backend, target=b"http://" + host + b"/x%2Fy?z")
    assert (got.target, got.values(b"host")) == (b"/x%2Fy?z", [b"test"])
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


@pytest.mark.parametrize("counts", [[b"0"], [b"5", b"0"]])
def test_options_with_max_forwards_0_is_answered_here(
    balancer: Balancer, backend: WireBackend, counts: list[bytes]
) -> None:
    """Rule 12, S 7.6.2: MUST NOT be forwarded; the smallest of several counts."""
    lines = [b"Max-Forwards: " + count for count in counts]
    assert 200 <= ask(balancer.port, request(b"/", *lines, method=b"OPTIONS"))[0] < 300
    assert backend.seen == 0


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

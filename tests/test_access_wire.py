"""Who may use the control API, with bytes on real connections, and through nginx."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from control import bearer
from support import (
    PAGE_TOKEN,
    PYTHON,
    Balancer,
    BalancerProcess,
    Process,
    exchange,
    fetch,
    free_port,
    nginx_before,
    split_response,
)
from test_http2 import client as http2
from wire import post


@pytest.fixture(scope="module")
def balancer() -> Iterator[Balancer]:
    env = {"LB_PAGE_TOKEN": PAGE_TOKEN}
    with Balancer(f"--backend=a=http://127.0.0.1:{free_port()}", env=env) as started:
        yield started


@pytest.mark.parametrize("path", [b"/status", b"/health", b"/dashboard"])
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"Host:"],
        [b"Host: localhost", b"Host: localhost"],
        [b"Host: localhost", b"Host: evil.example"],
        [b"Host: localhost, evil.example"],
        [b"Host: user@localhost"],
        [b"Host: localhost/x"],
        [b"Host: [::1]x:80"],
    ],
    ids=str,
)
def test_control_paths_obey_the_rules_of_host(balancer: Balancer, path: bytes, lines: list[bytes]) -> None:
    """RFC 9112 section 3.2."""
    asked = b"\r\n".join([b"GET " + path + b" HTTP/1.1", *lines, b"Connection: close"]) + b"\r\n\r\n"
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 400 ")


def test_the_authority_of_an_absolute_form_is_checked_where_it_can_be_seen(balancer: Balancer) -> None:
    """RFC 9112 section 3.2.2. Granian shows it only without a Host line; with one, that line is what is checked."""
    lines = b"\r\nConnection: close\r\n\r\n"
    for asked, status in (
        (b"GET http://evil.example/status HTTP/1.1", 401),
        (b"GET http://evil.example/status HTTP/1.1\r\nHost: evil.example", 401),
        (b"GET http://localhost/status HTTP/1.1\r\nHost: evil.example", 401),
        (b"GET http://localhost/status HTTP/1.1", 200),
        (b"GET http://localhost/status HTTP/1.1\r\nHost: localhost", 200),
    ):
        assert split_response(exchange(balancer.port, asked + lines))[0] == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":authority", b"localhost")], 200),
        ([(b":authority", b""), (b"host", b"localhost")], 200),
        ([(b":authority", b"evil.example")], 401),
        ([(b":authority", b"localhost"), (b"host", b"evil.example")], 401),
        ([(b":authority", b""), (b"host", b"localhost"), (b"host", b"localhost")], 400),
        ([(b":authority", b"localhost"), (b"host", b"a"), (b"host", b"b")], 400),
        ([(b":authority", b"")], 400),
    ],
    ids=str,
)
def test_the_authority_of_http_2(balancer: Balancer, fields: list[tuple[bytes, bytes]], status: int) -> None:
    """RFC 9113 section 8.3.1. Granian shows `host` alone where both are there, so that is what is checked."""
    with http2(balancer) as h2:
        h2.request(1, (b":path", b"/status"), *fields)
        assert h2.finish(1).status == status


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 2"])
@pytest.mark.parametrize("content_type", [b"Content-Type: text/plain", b"X-None: 1"])
def test_a_body_must_be_json_whatever_its_framing(balancer: Balancer, framing: bytes, content_type: bytes) -> None:
    body = b"{}" if framing.startswith(b"Content") else b"2\r\n{}\r\n0\r\n\r\n"
    asked = post(content_type, framing, b"Connection: close", body=body, target=b"/reset")
    asked = asked.replace(b"Host: test", b"Host: localhost")
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 415 ")
    asked = asked.replace(content_type, b"Content-Type: application/json")
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("body", "status"), [(b"{}", 415), (b"", 200)])
def test_a_body_must_be_json_over_http_2_too(balancer: Balancer, body: bytes, status: int) -> None:
    """Where no Content-Length tells that there is one."""
    with http2(balancer) as h2:
        h2.request(1, (b":path", b"/reset"), (b":authority", b"localhost"), method=b"POST", end=False)
        h2.data(1, body)
        assert h2.finish(1).status == status


def test_a_forged_line_is_in_no_log() -> None:
    with BalancerProcess(f"--backend=a=http://127.0.0.1:{free_port()}", "--log-level=debug") as balancer:
        for method in ("GET", "PATCH", "DELETE"):
            fetch(f"{balancer.url}/backends/a%0aFORGED%1b[31m", {} if method == "PATCH" else None, method)
        fetch(f"{balancer.url}/backends/a%0aFORGED", b'{"\\ud800": 1}', "PATCH", Content_Type="application/json")
    assert not any(line.startswith("FORGED") or "\x1b" in line for line in balancer.lines)
    assert "Traceback" not in balancer.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--allow-file-origin"], "allow_file_origin does nothing any more"),
        (["--host=0.0.0.0"], "the control API only answers probes"),
        ([], None),
        (["--host=0.0.0.0", "--control-reads=open"], None),
    ],
    ids=str,
)
def test_what_does_not_do_what_one_may_expect_is_told_at_the_start(flags: list[str], words: str | None) -> None:
    with Process([PYTHON, "load_balancer.py", "--check-config", *flags]) as process:
        assert process.wait() == 0
    assert words in process.output if words else "warning" not in process.output
    assert process.output.count("warning") == (words is not None)


def test_a_proxy_that_hides_itself_has_another_user(tmp_path: Path, balancer: Balancer) -> None:
    """As nginx does from 1.29.7 on without a word of its owner: HTTP/1.1, no header of its own, our Host."""
    hidden = 'proxy_http_version 1.1; proxy_set_header Connection "";'
    with nginx_before(tmp_path, balancer, hidden) as url:
        new = {"id": "b", "url": "http://169.254.169.254"}
        # Started by root its workers are somebody else; else they are ourselves, and nobody can tell.
        assert fetch(f"{url}/backends", new)[0] == (401 if os.geteuid() == 0 else 201)
        assert fetch(f"{balancer.url}/backends/b", method="DELETE")[0] == (404 if os.geteuid() == 0 else 200)


@pytest.mark.parametrize("more", ["", "proxy_http_version 1.1; proxy_set_header X-Forwarded-For $remote_addr;"])
def test_behind_nginx_nobody_is_local(tmp_path: Path, balancer: Balancer, more: str) -> None:
    with nginx_before(tmp_path, balancer, more) as url:
        new = {"id": "b", "url": "http://169.254.169.254"}
        assert fetch(f"{url}/backends", new)[0] == fetch(f"{url}/status")[0] == 401
        assert fetch(f"{url}/status", **bearer(PAGE_TOKEN))[0] == 200
        assert fetch(f"{url}/backends", new, **bearer(PAGE_TOKEN))[0] == 201
        assert fetch(f"{url}/backends/b", method="DELETE", **bearer(PAGE_TOKEN))[0] == 200

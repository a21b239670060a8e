"""Service workers: the page of a backend may register one, and its scope must not cover the control API."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support import (
    Balancer,
    connect,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    ok,
    split_response,
    wait_until,
)
from wire import WireBackend


@pytest.fixture(scope="module")
def scripts() -> Iterator[WireBackend]:
    with WireBackend() as backend:
        backend.answer(ok(b"script", b"Content-Type: text/javascript", b"Service-Worker-Allowed: /", b"X-Kept: 1"))
        yield backend


def register(balancer: Balancer, target: bytes) -> tuple[int, dict[bytes, bytes]]:
    answer = exchange(balancer.port, get(target, b"Service-Worker: script", host=b"localhost"))
    status, lines, _ = split_response(answer)
    return status, dict(lines)


@pytest.mark.parametrize(
    ("flags", "refused", "forwarded"),
    [
        ([], [b"/sw.js", b"/sw.js?v=1", b"/x%2Fsw.js", b"/?/a/b"], [b"/app/sw.js", b"/app/?x=/", b"//sw.js"]),
        (
            ["--control-prefix=/lb"],
            [b"/sw.js", b"/lb/sw.js", b"/%6cb/sw.js"],
            [b"/app/sw.js", b"/lb/x/sw.js", b"/lbx/sw.js"],
        ),
        (["--control-prefix=/a/b"], [b"/sw.js", b"/a/sw.js", b"/a/b/sw.js"], [b"/b/sw.js", b"/a/c/sw.js"]),
        (["--control-port={free}"], [], [b"/sw.js", b"/app/sw.js"]),
    ],
    ids=str,
)
def test_a_service_worker_over_the_control_api_is_refused(
    scripts: WireBackend, flags: list[str], refused: list[bytes], forwarded: list[bytes]
) -> None:
    free = str(free_port())
    with Balancer(
        f"--backend=b={scripts.url}", *[flag.replace("{free}", free) for flag in flags], wait_ready=False
    ) as balancer:
        has_own_port = any("port" in flag for flag in flags)
        wait_until(lambda: fetch(f"{balancer.url}/x")[0] == 200, what="the backend is up")
        for target in refused * 2:
            assert register(balancer, target)[0] == 403
            assert exchange(balancer.port, get(target, host=b"localhost")).startswith(b"HTTP/1.1 200 ")
        for target in forwarded * 2:
            status, lines = register(balancer, target)
            assert status == 200 and lines[b"x-kept"] == b"1"
            assert (b"service-worker-allowed" in lines) is has_own_port
        got = next(request for request in reversed(scripts.requests) if request.target == forwarded[0])
        assert got.values(b"service-worker") == [b"script"]


@pytest.mark.parametrize(
    ("allowed", "is_kept"),
    [
        (b"/app/", True),
        (b"/app", True),
        (b"/", False),
        (b"/stat", False),
        (b"/dashboard", False),
        (b"../", False),
        (b"/app/../", False),
        (b"/app/%2e%2e/", False),
        (b"\\", False),
        (b"http://localhost/", False),
        (b"//localhost/", False),
        (b"", False),
    ],
)
def test_how_far_an_answer_may_let_a_service_worker_reach(
    scripts: WireBackend, balancer_of_scripts: Balancer, allowed: bytes, is_kept: bool
) -> None:
    scripts.answer(ok(b"script", b"Service-Worker-Allowed: " + allowed))
    status, lines = register(balancer_of_scripts, b"/app/js/sw.js")
    assert status == 200 and (lines.get(b"service-worker-allowed") == allowed) is is_kept
    scripts.answer(ok(b"x" * 300_000, b"Service-Worker-Allowed: " + allowed))  # not whole at once
    assert (register(balancer_of_scripts, b"/app/js/sw.js")[1].get(b"service-worker-allowed") == allowed) is is_kept


@pytest.fixture(scope="module")
def balancer_of_scripts(scripts: WireBackend) -> Iterator[Balancer]:
    with Balancer(f"--backend=b={scripts.url}") as started:
        started.wait_healthy("b")
        yield started


def test_a_refused_service_worker_is_on_record(scripts: WireBackend, balancer_of_scripts: Balancer) -> None:
    with connect(balancer_of_scripts.port) as sock:
        sock.sendall(get(b"/sw.js", b"Service-Worker: script"))
        status, _, body = split_response(sock.recv(65536))
    assert status == 403 and "control_port" in json.loads(body)["error"]
    told = fetch_json(f"{balancer_of_scripts.url}/requests/{json.loads(body)['request_id']}")
    assert (told["status"], told["reason"], told["tried"]) == (403, "http_request_denied", [])

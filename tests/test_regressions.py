"""Cases that an attack on the finished program found; each names what happened then."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import (
    PYTHON,
    ROOT,
    Balancer,
    BalancerProcess,
    Process,
    connect,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    wait_until,
)
from wire import WireBackend


def cpu_seconds() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_many_clients_that_leave_their_uploads_cost_little(balancer: Balancer, backend: WireBackend) -> None:
    """Each one walked over all descriptors: after 1,000 of them the next request took 12 s."""
    with ExitStack() as clients:
        sockets = [clients.enter_context(connect(balancer.port)) for _ in range(400)]
        for sock in sockets:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nx")
        wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 400)
        before = cpu_seconds()
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0)
    assert cpu_seconds() - before < 3
    assert fetch(balancer.url)[0] == 200


def test_a_chunked_control_body_is_not_cut_but_refused() -> None:
    """Valid JSON, blanks up to the limit, then garbage: it was accepted."""
    body = b'{"algorithm": "round_robin"}' + b" " * 70_000 + b"garbage"
    head = b"POST /algorithm HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    framed = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    with Balancer("--backend=http://127.0.0.1:1", wait_ready=False) as balancer:
        assert exchange(balancer.port, head + framed).startswith(b"HTTP/1.1 413 ")
        assert balancer.status()["algorithm"] == "weighted"


def test_errors_name_no_inside_address_to_clients(balancer: Balancer, backend: WireBackend) -> None:
    """The URL of the backend stood in the answer; it belongs into /status."""
    backend.answer(b"garbage\r\n\r\n", close=True)
    status, _, body = fetch(balancer.url)
    assert status == 502
    assert b"127.0.0.1" not in body and str(backend.port).encode() not in body
    (record,) = balancer.status(1)["recent_requests"]
    assert "malformed" in record["tried"][0]["error"]


@pytest.mark.parametrize("script", ["load_balancer.py", "backend_server.py"])
def test_ctrl_c_while_it_starts_shows_no_traceback(script: str) -> None:
    """It did, in the half second that the imports take."""
    with Process([PYTHON, "-v", str(ROOT / script), "--port", str(free_port())]) as process:
        wait_until(lambda: "flask" in process.output)
        process.send(signal.SIGINT)
        assert process.wait() in (-signal.SIGINT, 130)
    assert "Traceback" not in process.output


def test_running_out_of_descriptors_is_not_the_backends_fault() -> None:
    """They were marked down with "Too many open files"."""
    with WireBackend() as backend, BalancerProcess(f"--backend=only={backend.url}", "--drain-timeout=1") as balancer:
        backend.script = lambda sock, request: None
        resource.prlimit(balancer.pid, resource.RLIMIT_NOFILE, (200, 200))
        with ExitStack() as clients:
            for _ in range(150):
                clients.enter_context(connect(balancer.port)).sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            started = time.monotonic()
            wait_until(lambda: time.monotonic() - started > 2)  # several rounds of health checks
        events = wait_until(lambda: fetch_json(f"{balancer.url}/events"), "it answers again")["events"]
        assert [event for event in events if event["kind"] == "backend_down"] == []


def test_clients_that_left_do_not_hold_up_the_end(scripted: WireBackend) -> None:
    """Granian had ended with its last connection, and the request waited out the drain time-out all the same."""
    scripted.reset()
    scripted.script = lambda sock, request: None
    with Balancer(f"--backend=only={scripted.url}") as balancer, ThreadPoolExecutor(1) as threads:
        with connect(balancer.port) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            wait_until(lambda: scripted.requests)
            ending = threads.submit(balancer.library.stop, 600)
            wait_until(lambda: "1 requests in flight" in balancer.library.events()[-1]["message"])
        ending.result(60)


@pytest.mark.parametrize("length", [b"+2", b"2, 3"])
def test_a_head_answer_with_a_malformed_length_is_no_answer(
    balancer: Balancer, backend: WireBackend, length: bytes
) -> None:
    """There is no body to be framed by it, so it was passed on, or the client got an empty reply."""
    backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n" % length)
    assert fetch(balancer.url, method="HEAD")[0] == 502


@pytest.mark.parametrize("method", [b"GET", b"POST", b"DELETE"])
def test_an_empty_body_with_its_length_is_no_error(
    balancer: Balancer, backend: WireBackend, method: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """On the express way it was a 500 with a traceback in the log."""
    assert exchange(balancer.port, get(b"/", b"Content-Length: 0", method=method)).startswith(b"HTTP/1.1 200 ")
    assert "Traceback" not in caplog.text


def test_a_trailer_without_end_is_cut_off(balancer: Balancer, backend: WireBackend) -> None:
    """It was collected in memory for as long as the backend cared to send."""
    sent: list[int] = []

    def script(sock: socket.socket, _: object) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: ")
        while sum(sent) < 64 * 2**20:
            sent.append(sock.send(b"x" * 65536))

    backend.script = script
    assert not exchange(balancer.port, get()).endswith(b"0\r\n\r\n")
    assert sum(sent) < 16 * 2**20  # what the buffers of two sockets hold, and some more
    (record,) = balancer.status(1)["recent_requests"]
    # A 502 if all of it came before anything was passed on, else a visible break.
    assert (record["status"], record["complete"]) in ((200, False), (502, True))

"""Ending and reloading by signals, with real processes: what clients still get, what they are told, and exit codes."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
from support import (
    PYTHON,
    ROOT,
    Process,
    RawRequest,
    StartProcess,
    accepts,
    connect,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    ok,
    read_all,
    split_response,
    wait_until,
)
from test_failover import Load
from test_http2 import client
from wire import WireBackend, large, read_response, request, wait_closed

LONG = ("--shutdown-delay=600", "--drain-timeout=600")  # nothing here may wait for these


@pytest.fixture
def go_on(scripted: WireBackend) -> Iterator[Event]:
    """The backend answers `/held` only when this is set."""
    event = Event()

    def script(sock: socket.socket, asked: RawRequest) -> None:
        if asked.target == b"/held":
            event.wait()
        sock.sendall(ok())

    scripted.script = script
    yield event
    event.set()


# The delay: still serving, but telling everybody to go elsewhere.


def test_during_the_delay_all_is_served_and_everybody_is_told(start_process: StartProcess) -> None:
    balancer = start_process(*LONG)
    with connect(balancer.port) as kept, kept.makefile("rb") as stream:
        kept.sendall(request(b"/"))
        status, lines, _ = read_response(stream)
        assert status == 200 and b"connection" not in dict(lines)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: fetch(f"{balancer.url}/readyz")[0] == 503)
        kept.sendall(request(b"/"))
        status, lines, _ = read_response(stream)
        assert (status, dict(lines)[b"connection"]) == (200, b"close")
        assert wait_closed(kept)
    assert json.loads(fetch(f"{balancer.url}/readyz")[2])["lifecycle"] == "draining"
    assert balancer.status()["lifecycle"] == "draining"
    assert fetch(f"{balancer.url}/")[0] == 200  # a new connection
    (event,) = (e for e in fetch_json(f"{balancer.url}/events")["events"] if e["kind"] == "draining")
    assert event["backend"] is None
    assert re.fullmatch(
        r"\d+ requests in flight have at most 600 s to finish, after 600 s in which more are accepted \(SIGTERM\)",
        event["message"],
    )
    wait_until(lambda: event["message"] in balancer.output)
    balancer.send(signal.SIGTERM)  # the delay is over
    assert balancer.wait() == 0


def test_nothing_is_lost_if_traffic_moves_away_within_the_delay(start_process: StartProcess) -> None:
    """As behind another load balancer, which asks /readyz and needs a moment to notice."""
    balancer = start_process(*LONG)
    with Load(balancer.port, per_second=1e6) as load:
        balancer.send(signal.SIGTERM)
        wait_until(lambda: not balancer.is_ready())
        load.wait_for(50)
    assert load.failed == []
    balancer.send(signal.SIGTERM)  # the delay is over
    assert balancer.wait() == 0
    assert "cut off" not in balancer.output


def test_what_waits_for_a_thread_when_the_delay_ends_is_finished_too(
    start_process: StartProcess, scripted: WireBackend, go_on: Event
) -> None:
    balancer = start_process("--max-threads=1", "--shutdown-delay=5")
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(exchange, balancer.port, large(b"/held"))]
        wait_until(lambda: scripted.seen == 1)
        sent = time.monotonic()
        balancer.send(signal.SIGTERM)
        wait_until(lambda: "draining" in balancer.output)
        answers += [threads.submit(exchange, balancer.port, large(b"/held")) for _ in range(2)]
        wait_until(lambda: not accepts(balancer.port), what="the delay is over")
        assert time.monotonic() - sent >= 5
        go_on.set()
        assert [split_response(answer.result())[0] for answer in answers] == [200] * 3
    assert balancer.wait() == 0


def test_a_control_port_says_to_the_end_what_goes_on(
    start_process: StartProcess, scripted: WireBackend, go_on: Event
) -> None:
    port = free_port()
    balancer = start_process(f"--control-port={port}", wait_ready=False)
    wait_until(lambda: fetch(f"http://127.0.0.1:{port}/readyz")[0] == 200)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(exchange, balancer.port, get(b"/held"))
        wait_until(lambda: scripted.seen == 1)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: not accepts(balancer.port))
        assert fetch(f"http://127.0.0.1:{port}/readyz")[0] == 503
        assert fetch_json(f"http://127.0.0.1:{port}/status")["statistics"]["active_requests"] == 1
        go_on.set()
        assert answer.result().startswith(b"HTTP/1.1 200 ")
    assert balancer.wait() == 0


def test_http2_is_served_during_the_delay_and_told_to_go_after_it(
    start_process: StartProcess, scripted: WireBackend, go_on: Event
) -> None:
    """RFC 9113 section 6.8: GOAWAY, and the streams that are open are finished."""
    balancer = start_process("--shutdown-delay=5")
    with client(balancer) as h2:
        h2.request(1)
        assert h2.finish(1).status == 200
        balancer.send(signal.SIGTERM)
        wait_until(lambda: "draining" in balancer.output)
        h2.request(3)
        assert h2.finish(3).status == 200 and not h2.is_closed
        h2.request(5, (b":path", b"/held"))
        wait_until(lambda: scripted.requests[-1].target == b"/held")
        wait_until(lambda: not accepts(balancer.port), what="the delay is over")
        go_on.set()
        assert h2.finish(5).status == 200
        h2.read_to_end()
        assert h2.is_told_to_go
    assert balancer.wait() == 0


# In a hurry.


def test_ctrl_c_skips_the_delay(start_process: StartProcess) -> None:
    balancer = start_process(*LONG)
    balancer.send(signal.SIGINT)
    assert balancer.wait() == 130


@pytest.mark.parametrize(("busy", "number"), [(False, signal.SIGINT), (True, signal.SIGTERM)], ids=["idle", "busy"])
def test_a_second_signal_ends_the_delay_and_everything_else(
    start_process: StartProcess,
    scripted: WireBackend,
    go_on: Event,
    number: signal.Signals,
    busy: bool,
) -> None:
    balancer = start_process(*LONG)
    with connect(balancer.port) as sock:
        if busy:
            sock.sendall(get(b"/held"))
            wait_until(lambda: scripted.seen == 1)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: "draining" in balancer.output)
        balancer.send(number)
        assert balancer.wait() == 0
        assert read_all(sock) == b""
    assert ("a second signal came: cut off 1 requests" in balancer.output) is busy
    assert "Traceback" not in balancer.output


# A server whose reload takes as long as a file exists.
RELOADING = """
import logging, os, sys, threading
from balancer.config.settings import Settings
from balancer.edge.bridge import Bridge
from balancer.edge.listener import ClientLimits, PortOptions
from balancer.edge.port import Port
from balancer.edge.process import serve
from balancer.edge.server import Server
from balancer.edge.tcpsocket import listen
from balancer.edge.workers import WorkerPool

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
folder = sys.argv[1]

def app(environ, start_response):
    start_response("200 OK", [("content-length", "2")])
    return [b"ok"]

def reload():
    print("reload begins in", threading.current_thread().name, flush=True)
    if os.path.exists(folder + "/broken"):
        raise ValueError("broken")
    while os.path.exists(folder + "/hold"):
        threading.Event().wait(0.01)
    print("reload ends", flush=True)

options = Settings().options
bridge = Bridge(app, WorkerPool(4, 4, 1), options(ClientLimits))
port = Port(bridge, listen("127.0.0.1", 0), options(PortOptions))
print("port", port.address[1], flush=True)
sys.exit(serve(Server([port]), drain_timeout=30, shutdown_delay=0, on_hangup=reload))
"""

# SIGHUP.


@pytest.fixture
def reloading(tmp_path: Path) -> Iterator[Process]:
    with Process([PYTHON, "-c", RELOADING, str(tmp_path)]) as process:
        wait_until(lambda: "port" in process.output, what="it listens")
        yield process


def answers(process: Process) -> bool:
    port = process.output.split()[1]
    return fetch(f"http://127.0.0.1:{port}/")[0] == 200


def test_hangups_during_a_reload_are_one_more_after_it(reloading: Process, tmp_path: Path) -> None:
    assert answers(reloading)
    (tmp_path / "hold").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "reload begins in reload" in reloading.output)
    for _ in range(5):
        reloading.send(signal.SIGHUP)
    assert answers(reloading)  # not in the loop
    assert reloading.output.count("reload begins") == 1
    (tmp_path / "hold").unlink()
    wait_until(lambda: reloading.output.count("reload ends") == 2)
    reloading.send(signal.SIGTERM)
    assert reloading.wait() == 0
    assert reloading.output.count("reload begins") == 2


def test_a_failed_reload_is_logged_the_next_one_runs_and_one_that_hangs_keeps_nothing(
    reloading: Process, tmp_path: Path
) -> None:
    assert answers(reloading)
    (tmp_path / "broken").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "ValueError: broken" in reloading.output)
    assert "ERROR reload failed" in reloading.output
    (tmp_path / "broken").unlink()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "reload ends" in reloading.output)
    assert answers(reloading)
    # One that hangs does not keep the process.
    (tmp_path / "hold").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: reloading.output.count("reload begins") == 3)
    reloading.send(signal.SIGTERM)
    assert reloading.wait() == 0


def test_hangup_while_it_starts_waits_until_it_has_started(tmp_path: Path) -> None:
    """It ended the process at once, by the default action, without a word."""
    file = tmp_path / "balancer.toml"
    file.write_text(f'port = 0\nbackends = ["http://127.0.0.1:{free_port()}"]\n', encoding="utf-8")
    with Process([PYTHON, str(ROOT / "load_balancer.py"), "--config", str(file)]) as process:
        wait_until(process.holds_hangup, what="its first lines have run")
        process.send(signal.SIGHUP)
        wait_until(lambda: "configuration reloaded" in process.output)
        assert not process.holds_hangup()
        process.send(signal.SIGTERM)
        assert process.wait() == 0
        assert "listening" in process.output


@pytest.mark.parametrize("program", ["load_balancer.py", "backend_server.py"])
def test_a_signal_that_asks_for_nothing_is_ignored_from_the_first_lines_on(program: str) -> None:
    """Whoever rotates logs sends SIGUSR1, by which a process ends that does not know it."""
    with Process([PYTHON, str(ROOT / program), "--port", str(free_port())]) as process:
        wait_until(lambda: process.has("SigIgn", signal.SIGUSR1), what="its first lines have run")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGIO, signal.SIGRTMAX):
            process.send(number)
        wait_until(lambda: process.has("SigCgt", signal.SIGTERM), "it serves")
        process.send(signal.SIGUSR1)
        process.send(signal.SIGTERM)
        assert process.wait() == 0

"""Ending and reloading by signals, with real processes: what clients still get, what they are told, and exit codes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PYTHON, DemoBackend, Process, fetch, wait_until

# A server whose reload takes as long as a file exists.
RELOADING = """
import logging, os, sys, threading
from balancer import server
from balancer.bridge import Bridge
from balancer.workers import WorkerPool

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

listener = server.listen("127.0.0.1", 0)
print("port", listener.getsockname()[1], flush=True)
sys.exit(server.serve([(Bridge(app, WorkerPool(4, 4, 1)), listener)], server.ServerOptions(), on_hangup=reload))
"""

# SIGHUP.


@pytest.fixture
def reloading(tmp_path: Path) -> Iterator[Process]:
    process = Process([PYTHON, "-c", RELOADING, str(tmp_path)])
    wait_until(lambda: "port" in process.output, what="it listens")
    yield process
    process.stop()


def answers(process: Process) -> bool:
    port = process.output.split()[1]
    return fetch(f"http://127.0.0.1:{port}/")[0] == 200


def test_hangup_calls_back_and_serving_goes_on(reloading: Process) -> None:
    assert answers(reloading)
    reloading.send(signal.SIGHUP)
    wait_until(lambda: reloading.output.count("reload ends") == 1)
    assert "reload begins in reload" in reloading.output
    assert answers(reloading)


def test_hangups_during_a_reload_are_one_more_after_it(reloading: Process, tmp_path: Path) -> None:
    assert answers(reloading)
    (tmp_path / "hold").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "reload begins" in reloading.output)
    for _ in range(5):
        reloading.send(signal.SIGHUP)
    assert answers(reloading)  # not in the loop
    assert reloading.output.count("reload begins") == 1
    (tmp_path / "hold").unlink()
    wait_until(lambda: reloading.output.count("reload ends") == 2)
    reloading.send(signal.SIGTERM)
    assert reloading.wait() == 0
    assert reloading.output.count("reload begins") == 2


def test_a_failed_reload_is_logged_and_the_next_one_runs(reloading: Process, tmp_path: Path) -> None:
    assert answers(reloading)
    (tmp_path / "broken").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "ValueError: broken" in reloading.output)
    assert "ERROR reload failed" in reloading.output
    (tmp_path / "broken").unlink()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "reload ends" in reloading.output)
    assert answers(reloading)


def test_a_reload_that_hangs_does_not_keep_the_process(reloading: Process, tmp_path: Path) -> None:
    assert answers(reloading)
    (tmp_path / "hold").touch()
    reloading.send(signal.SIGHUP)
    wait_until(lambda: "reload begins" in reloading.output)
    reloading.send(signal.SIGTERM)
    assert reloading.wait(10) == 0


def test_hangup_ends_what_has_nothing_to_reload() -> None:
    backend = DemoBackend("alone")
    backend.start()
    try:
        assert backend.process is not None
        backend.process.send(signal.SIGHUP)
        assert backend.process.wait(10) == 0
    finally:
        backend.stop()

"""The benchmark measures what it says: a short run of its own, and its parts on known input."""

from __future__ import annotations

import importlib.metadata
import math
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import machine
import openloop
import pytest
import quality
import render
import results
import run as command
import speed
from backends import Backends, count_at, fast_backends, slow_backends
from contenders import BODY, OURS, UPLOAD_PATH, WAIT_PATH
from processes import BenchError, get
from results import Figures, Run, Sample, Spread, rows_of
from slow_backend import FIRST_STALL_SECONDS, Backend, blocks, parse
from support import PYTHON, ROOT

# The whole command.


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, str(ROOT / "bench" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=170)


# The command with fewer ways to choose, and less of each.
CHOSEN = ("round_robin", "power_of_two")
SHORTER = f"""
import sys
sys.path.insert(0, {str(ROOT / "bench")!r})
import quality, run
quality.WARMUP_SECONDS, quality.SIMULATED_SECONDS = 0.2, 20.0
quality.REGISTRY = {{name: quality.REGISTRY[name] for name in {CHOSEN}}}
sys.exit(run.main())
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Run]:
    """A run of all parts, as short as they can be."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    arguments = [
        "--parts=all", "--contenders=balancer,baseline,nginx", "--loads=small-1,up-64k", "--rounds=1", "--seconds=1",
        "--stall-seconds=1", "--choice-seconds=1", f"--json={file}",
    ]  # fmt: skip
    done = subprocess.run([PYTHON, "-c", SHORTER, *arguments], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done, results.read(file)


def test_a_run_measures_every_contender_under_every_load(finished: tuple[Any, Run]) -> None:
    done, run = finished
    rows = results.rows_in(run, "speed")
    expected = {(who, load) for who in ("balancer", "baseline", "nginx") for load in ("small-1", "up-64k")}
    assert {(row.contender, row.load) for row in rows} == expected
    for row in rows:
        assert row.high("req/s") > 0 and row.high("CPU us/req") >= 0 and row.high("peak MiB") > 1
    for name, load in expected:
        assert any(line.split()[:2] == [name, load] for line in done.stdout.splitlines())


def test_a_run_has_every_part(finished: tuple[Any, Run]) -> None:
    found = {part: results.rows_in(finished[1], part) for part in ("stalls", "choice", "simulation")}
    assert [(row.contender, row.high("seconds")) for row in found["stalls"]] == [
        ("balancer", 1), ("baseline", 1), ("nginx", 1)
    ]  # fmt: skip
    for row in found["stalls"]:
        assert all(0 <= row.count(name) <= row.count("requests") > 0 for name in ("held", "failed"))
        assert 0 <= row.count("of its own") <= row.count("stalls")
        assert row.high("worst ms") >= row.high("p99 ms") >= row.high("p50 ms") > 0
    assert {(row.contender, row.method) for row in found["choice"]} == {
        (OURS, "power_of_two"), ("nginx", "least_conn")
    }  # fmt: skip
    assert all(row.high("worst direct ms") > 0 for row in found["choice"])
    assert {row.method for row in found["simulation"]} == set(CHOSEN)


def test_every_strategy_that_looks_is_measured() -> None:
    assert quality.methods([OURS, "nginx"]) == [
        *((OURS, name) for name in quality.REGISTRY if name not in quality.BLIND_STRATEGIES), ("nginx", "least_conn"),
    ]  # fmt: skip


def test_a_runs_file_fills_the_documentation(finished: tuple[Any, Run], tmp_path: Path) -> None:
    shutil.copy(render.DOCS / render.PAGE, tmp_path)
    written = render.write_docs(finished[1], tmp_path)
    page = (tmp_path / render.PAGE).read_text()
    assert render.summary_table(finished[1]).markdown() in page
    assert results.read(tmp_path / render.DATA) == finished[1]
    assert all(f"]({path.name})" in page for path in written if path.suffix != ".md")


def test_the_committed_page_says_what_the_committed_file_says(tmp_path: Path) -> None:
    shutil.copy(render.DOCS / render.PAGE, tmp_path)
    for path in render.write_docs(results.read(render.DOCS / render.DATA), tmp_path):
        assert path.read_text() == (render.DOCS / path.name).read_text()
        assert path.suffix == ".md" or len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders=apache"], "expected some of balancer"),
        (["--loads=small-2"], "small-2"),
        (["--require-ratio=2", "--contenders=balancer"], "baseline"),
        (["--render=/nowhere/results.json"], "/nowhere/results.json holds no results"),
        (["--transfer=much"], "not a size"),
        (["--json=/nowhere/results.json", "--contenders=balancer"], "/nowhere is no directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


# What all scripts have in common.

ENDS = 'if __name__ == "__main__":'
SCRIPTS = ["baseline", *sorted(path.stem for path in (ROOT / "bench").glob("*.py") if ENDS in path.read_text())]
WRONG = {
    "baseline": ["80"], "hedge": ["nan"], "run": ["--rounds=0"], "slow_backend": ["80:0.1", "65536:0.1"], "tls": ["0"],
    "websocket": ["--seconds=0"], "workers": ["1.5"],
}  # fmt: skip


def call(name: str, *arguments: str) -> int:
    """As a program of its own; the exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [name, *arguments])
            runpy.run_path(str(ROOT / "bench" / f"{name}.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_how_it_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {name}.py ") and len(said.splitlines()) < 70
    assert call(name, *WRONG.get(name, ["more"])) == 2
    told = capsys.readouterr()
    assert re.fullmatch(rf"{name}\.py: .*; see --help\n", told.err) and not told.out


@pytest.mark.parametrize(
    ("name", "programs"),
    [
        ("run", "caddy, envoy, haproxy, nginx, traefik, wrk"),
        ("tls", "caddy, h2load, nginx, openssl"),
        ("websocket", "caddy, nginx"),
        ("workers", "caddy, h2load, nginx"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, programs: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert call(name) == 2
    assert re.fullmatch(rf"bench: not installed: {programs} \(.*\)\n", capsys.readouterr().err)


# The fast backend.


@pytest.fixture(scope="module")
def fast() -> Iterator[Backends]:
    with fast_backends() as backends:
        yield backends


def test_an_upload_is_answered_only_when_it_has_been_read_whole(fast: Backends) -> None:
    with socket.create_connection(("127.0.0.1", fast.ports[0]), timeout=0.3) as sock:
        sock.sendall(b"POST %s HTTP/1.1\r\nHost: bench\r\nContent-Length: 100000\r\n\r\n" % UPLOAD_PATH.encode())
        sock.sendall(b"x" * 99999)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(60)
        sock.sendall(b"x")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


# The slow backend.


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--transfer=3MiB"], 0, "download, chunked"),
        (["--transfer=3MiB", "--max-growth=-1MiB"], 1, "allowed -1.0"),
        (["--concurrent=60", "--delay=0.5"], 0, "60/60"),
    ],
)
def test_checks_of_behaviour_pass_and_fail(arguments: list[str], code: int, told: str) -> None:
    done = bench("--contenders=nginx", *arguments)
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr


def test_a_slow_backend_is_slow_only_where_it_is_asked_to_be() -> None:
    with slow_backends("0.5", "0") as backends:
        slow, quick = backends.ports
        assert get(slow, "/") == (200, BODY)
        (shots,) = openloop.fire([openloop.Aim(slow, WAIT_PATH, [0.0] * 5)])
        assert all(shot.is_good and shot.latency >= 0.5 for shot in shots)
        assert [get(port, "/peak")[1] for port in (slow, quick)] == [b"5", b"0"]
        assert [count_at(port) for port in (slow, quick)] == [5, 0]
        assert get(quick, "/download/70000")[1] == get(quick, "/download/70000/chunked")[1] == b"".join(blocks(70000))


@pytest.mark.parametrize(
    ("start", "work", "expected"),
    [
        (0.0, 0.1, 0.1),
        (3.95, 0.1, 6.05),  # half of it before the stall from 4 to 6, half after
        (4.5, 0.1, 6.1),
        (5.0, 0.0, 6.0),
        (6.0, 0.1, 6.1),
        (18.9, 0.2, 21.1),  # the second one is from 19 to 21
        (3.9, 14.0, 21.9),
    ],
)
def test_work_rests_while_a_backend_stalls(start: float, work: float, expected: float) -> None:
    backend = parse("0.02:8:15:2")
    backend.restart(100.0)
    assert FIRST_STALL_SECONDS == 4.0
    assert backend.after(100.0 + start, work) - 100.0 == pytest.approx(expected)


def test_a_backend_does_no_more_than_its_slots_allow() -> None:
    backend = Backend(0.02, slots=4)
    backend.restart(0.0)
    last = max(backend.due(0.0) for _ in range(4000))
    assert last == pytest.approx(4000 / (4 / 0.02), rel=0.05)


# The open loop.


class Sleepy:
    """Answers at once, but for one pause."""

    def __init__(self, after: int, seconds: float) -> None:
        self._after, self._seconds, self._count = after, seconds, 0
        self._gate = threading.Lock()  # the pause holds everybody up
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="sleepy")]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock,), name="sleepy-connection")
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            while sock.recv(65536):
                with self._gate:
                    self._count += 1
                    if self._count == self._after:
                        threading.Event().wait(self._seconds)
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(60)


def test_a_pause_is_felt_by_every_request_that_was_due_in_it() -> None:
    server = Sleepy(after=50, seconds=0.5)
    try:
        (shots,) = openloop.fire([openloop.Aim(server.port, "/", openloop.steady(200, 1.0))])
    finally:
        server.close()
    assert len(shots) == 200 and all(shot.is_good for shot in shots)
    waited = [shot for shot in shots if shot.latency > 0.1]
    assert len(waited) >= 70  # 80 were due in its first 0.4 s; a closed loop would have seen one
    assert 0.45 <= max(shot.latency for shot in shots)
    assert len(openloop.late_windows(shots)) >= 1


def test_what_is_never_answered_has_failed_after_the_time_it_was_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        (shots,) = openloop.fire([openloop.Aim(deaf.getsockname()[1], "/", [0.0, 0.1])], patience=0.3)
    assert [shot.is_good for shot in shots] == [False, False]
    assert all(0.3 <= shot.latency < math.inf for shot in shots)


def test_what_finds_no_connection_free_waits_for_one_and_has_not_failed() -> None:
    server = Sleepy(after=1, seconds=0.3)
    try:
        (shots,) = openloop.fire([openloop.Aim(server.port, "/", [0.0] * 20)], most=2)
    finally:
        server.close()
    assert all(shot.is_good for shot in shots)
    assert [shot.was_held for shot in shots] == [number >= 2 for number in range(20)]
    assert openloop.figures(shots)["held"] == 18 and openloop.figures(shots)["failed"] == 0
    assert shots[2].latency >= 0.3  # its wait is part of it


def test_what_is_held_leaves_when_connections_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (shots,) = openloop.fire([openloop.Aim(port, "/", [0.0] * 5)], patience=30, most=1)
    assert not any(shot.is_good for shot in shots) and [shot.was_held for shot in shots] == [False, *[True] * 4]
    assert all(shot.latency < 30 for shot in shots)  # each was refused, none was forgotten


def test_poisson_traffic_is_the_same_for_the_same_seed() -> None:
    due = openloop.poisson(500, 20, seed=3)
    assert due == openloop.poisson(500, 20, seed=3) != openloop.poisson(500, 20, seed=4)
    assert due == sorted(due) and len(due) == pytest.approx(10000, rel=0.05)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.001, 1)])
def test_percentiles_are_of_nearest_rank(share: float, expected: int) -> None:
    assert openloop.percentile([float(value) for value in range(1, 101)], share) == expected


# Stalls.


def shots(*pairs: tuple[float, float]) -> list[openloop.Shot]:
    return [openloop.Shot(due, latency, True) for due, latency in pairs]


def test_late_answers_that_overlap_are_one_stall() -> None:
    late = shots((0.0, 0.01), (1.0, 0.5), (1.1, 0.4), (1.4, 0.2), (1.5, 0.01), (3.0, 0.06))
    assert openloop.late_windows(late) == [pytest.approx((1.0, 1.6)), pytest.approx((3.0, 3.06))]


@pytest.mark.parametrize(
    ("direct", "own"),
    [(shots((1.0, 0.001), (1.3, 0.001)), 1), (shots((1.2, 0.2)), 0), (shots((0.1, 0.2), (2.0, 0.2)), 1)],
)
def test_a_stall_is_its_own_unless_the_direct_way_was_late_too(direct: list[openloop.Shot], own: int) -> None:
    found = openloop.summarise(shots((0.5, 0.001), (1.0, 0.5)), direct)
    assert (found["stalls"], found["of its own"]) == (1, own)


# The choice.


@pytest.mark.parametrize("number", [0, 1])
def test_going_by_time_has_the_best_p99_with_unequal_backends(number: int) -> None:
    p99: Any = {name: quality.simulate(number, name, 120.0)["p99 ms"] for name in quality.REGISTRY}
    best = p99["least_response_time"]
    assert best == min(p99.values())
    assert best < 0.75 * p99["least_connections"]  # which is what nginx and HAProxy do
    assert p99["peak_ewma"] < p99["least_connections"] < p99["round_robin"]


def test_a_simulation_can_be_replayed() -> None:
    assert quality.simulate(0, "power_of_two", 20.0) == quality.simulate(0, "power_of_two", 20.0)


# From samples to rows and tables.


def sample(contender: str, cpu: float | None, number: int = 0, load: str = "small-1", **more: Any) -> Sample:
    figures: Figures = {"errors": 0, "req/s": 1000.0, "p50 ms": 1.0, "p99 ms": 2.0, "others %": 0.0, "CPU us/req": cpu}
    return Sample("speed", load, contender, "", number, figures | more)


def stall(contender: str, **more: Any) -> Sample:
    counts: Figures = dict.fromkeys(("requests", "failed", "held", "stalls", "of its own"), 0)
    times: Figures = dict.fromkeys(("seconds", "p50 ms", "p99 ms", "worst ms", "worst direct ms"), 1.0)
    return Sample("stalls", "", contender, "", 0, counts | times | more)


def choice(contender: str, method: str, p99: float = 1.0, number: int = 0, **more: Any) -> Sample:
    return Sample("choice", "", contender, method, number, {"requests": 10, "failed": 0, "p99 ms": p99} | more)


MACHINE = {
    "date": "2030-01-01", "commit": "abc1234", "cpu": "CPU", "cpus": 2, "kernel": "6", "versions": {"wrk": "4"},
    "python": {"version": "3.12.0", "build": "built somehow", "is_optimised": True, "step_ns": 400.0},
}  # fmt: skip
OPTIONS = {"seconds": 2, "choice_seconds": 9, "command": "./bench/run.sh"}


def run_of(*samples: Sample, **machine: Any) -> Run:
    return Run(MACHINE | machine, OPTIONS, rows_of(list(samples)))


def test_counts_add_up_and_others_become_a_spread() -> None:
    row, empty = rows_of([
        sample("nginx", 3.0, 0, errors=2), sample("nginx", 1.0, 1, errors=1), sample("nginx", 2.0, 2),
        sample("caddy", None),
    ])  # fmt: skip
    assert (row.rounds, row.count("errors"), row.spread("CPU us/req")) == (3, 3, Spread(2.0, 1.0, 3.0))
    assert empty.spread("CPU us/req") is None and empty.high("req/s") == 1000.0


def test_ratios_are_of_the_same_round() -> None:
    run = run_of(
        sample("balancer", 50.0), sample("nginx", 25.0), sample("baseline", 1000.0),
        sample("balancer", 500.0, 1), sample("nginx", 250.0, 1), sample("baseline", 10000.0, 1),
    )  # fmt: skip
    by_name = {row.contender: row for row in run.rows}
    assert by_name["nginx"].spread("ours/this") == Spread(2.0, 2.0, 2.0)
    assert by_name["balancer"].spread("baseline/this") == Spread(20.0, 20.0, 20.0)
    assert list(results.missed_ratio(run, 20.0)) == []
    assert "wanted at most 1/21" in list(results.missed_ratio(run, 21.0))[0]


def test_a_contender_without_a_good_answer_has_errors_and_no_cost() -> None:
    run = run_of(sample("baseline", None, errors=5, **{"req/s": 0.0}), sample("balancer", 1.0))
    assert render.table(run, "speed").rows[0][:5] == ["baseline", "small-1", "0", "5", "-"]
    assert list(results.missed_ratio(run, 2.0)) == ["balancer, small-1: no ratio, wanted at most 1/2"]


def test_results_survive_the_file(tmp_path: Path) -> None:
    run = run_of(sample("nginx", 1.0), stall("nginx"), choice("nginx", "least_conn"))
    file = tmp_path / "results.json"
    file.write_text(results.as_text(run))
    assert results.read(file) == run


def test_failures_and_late_direct_requests_are_warned_of() -> None:
    told = list(results.warnings(run_of(
        stall("nginx"), stall("caddy", requests=9, failed=2, held=3), stall("haproxy", **{"worst direct ms": 26.0}),
        choice("nginx", "a", failed=4), choice("nginx", "b", 1, **{"worst direct ms": 30.0}), choice("nginx", "c"),
        sample(OURS, 1.0, errors=1), sample("caddy", 1.0, **{"not forwarded %": 2.0, "others %": 11.0}),
    )))  # fmt: skip
    assert [warning.partition(": ")[0] for warning in told[:-1]] == [
        "caddy, stalls", "caddy, stalls", "haproxy, stalls", "nginx, choice, a", "nginx, choice, b",
        "balancer, small-1", "caddy, small-1",
    ]  # fmt: skip
    assert "2 of 9 requests failed" in told[0] and "3 of 9 requests left late" in told[1] and "26 ms" in told[2]
    assert told[-1] == "something else took over 10% of the machine in 1 of 8 rows, up to 11%"


# Goals.


def test_goals_go_by_the_median_of_the_rounds() -> None:
    cpu = {"balancer": (10.0, 13.0, 10.0), "envoy": (20.0, 20.0, 20.0), "caddy": (6.0, 6.0, 6.0)}
    run = run_of(*(
        sample(who, cost, n, load) for load in ("small-1000", "up-64k") for who, costs in cpu.items()
        for n, cost in enumerate(costs)
    ), *(sample(who, None, **{"p50 ms": p50}) for who, p50 in (("balancer", 0.25), ("envoy", 0.2))))  # fmt: skip
    found = {text: (measured, is_reached) for text, measured, is_reached in results.goals(run)}
    assert found["CPU per request, small-1000: at most 0.8 x envoy's"] == ("0.50 (0.50..0.65)", True)
    assert found["CPU per request, up-64k: at most 1 x caddy's"] == ("1.67 (1.67..2.17)", False)
    assert found["p50, small-1: at most 1.2 x envoy's"] == ("1.25 (1.25..1.25)", False)
    assert found["CPU per request, small-1: at most 1.1 x envoy's"] == ("-", None)


# The page.


def test_a_page_says_how_noisy_its_machine_was() -> None:
    quiet, busy = run_of(sample(OURS, 1.0)), run_of(sample(OURS, 1.0, **{"others %": 12.0}))
    assert "commit abc1234, 1 rounds of 2 s, 400 ns" in render.about_run(quiet) and "Not a" not in render.about_run(
        quiet
    )
    assert "Not a quiet machine:** something else took over 10% of the machine in 1 of 1 rows" in render.about_run(busy)


def test_a_page_without_a_marker_is_refused() -> None:
    with pytest.raises(BenchError, match="'run'"):
        render.fill("no markers here", run_of())


# The machine and the interpreter.


@pytest.mark.parametrize(
    ("prefix", "configured", "is_optimised"),
    [
        ("/usr/local", "'--enable-optimizations' '--with-lto'", True),
        ("/usr", "'--enable-shared' '--prefix=/usr'", True),
        ("/home/me/python", "'--enable-shared'", False),
    ],
)
def test_how_an_interpreter_was_built(prefix: str, configured: str, is_optimised: bool) -> None:
    build, optimised = machine.build_of(prefix, configured)
    assert optimised is is_optimised and build


def test_a_run_tells_its_interpreter_and_warns_of_a_slow_build(finished: tuple[Any, Run]) -> None:
    done, run = finished
    assert run.machine["python"]["version"] == sys.version.split()[0] and run.machine["python"]["step_ns"] > 10
    assert done.stdout.splitlines()[0] == f"{machine.about(run.machine)}, {machine.pace(run.machine)}"
    assert {"nginx", "wrk", "Granian"} <= set(run.machine["versions"])
    assert f"Granian {importlib.metadata.version('granian')}" in machine.about(run.machine)
    slow = run_of(python=MACHINE["python"] | {"is_optimised": False})
    assert ["--python" in warning for warning in results.warnings(slow)] == [True]
    assert list(results.warnings(run_of())) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("nginx version: nginx/1.22.1", "1.22.1"),
        ("HAProxy version 2.6.12-1+deb12u4 2026/10/17", "2.6.12-1+deb12u4"),
        ("wrk debian/4.1.0-3+b2 [epoll] Copyright (C) 2012", "4.1.0-3+b2"),
        ("what?", "of unknown version"),
    ],
)
def test_the_version_of_a_program_is_the_first_thing_that_looks_like_one(
    tmp_path: Path, answer: str, expected: str
) -> None:
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\necho "{answer}" >&2\nexit 1\n')
    program.chmod(0o755)
    assert machine.program_version(str(program), "-v") == expected
    assert machine.program_version(str(tmp_path / "missing"), "-v") is None


def test_all_loads_need_not_be_named() -> None:
    assert command.parse(["--loads=all"]).loads == list(speed.LOADS)


def test_every_text_says_how_long_a_run_takes_and_it_is_less_than_ten_minutes() -> None:
    minutes = round(command.expected_seconds(command.parse([])) / 60)
    texts = [
        bench("--help").stdout,
        (ROOT / "bench" / "README.md").read_text(),
        (render.DOCS / render.PAGE).read_text(),
    ]
    assert minutes < 10 and all(f"{minutes} minutes: " in text for text in texts), minutes


def run_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "run.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("program", ["/nowhere/python", "false"])
def test_what_is_no_interpreter_is_refused_before_anything_is_installed(program: str) -> None:
    done = run_sh("--parts", "speed", f"--python={program}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"bench/run.sh: error: --python {program}: Python 3.11 or newer is needed")


def test_help_render_and_wrong_arguments_need_no_set_up() -> None:
    assert run_sh("--help").stdout == bench("--help").stdout
    assert run_sh("--render", "/nowhere/results.json").returncode == 2
    assert run_sh("--loud").stderr == "run.sh: unrecognized arguments: --loud; see --help\n"


def test_a_shim_and_a_link_are_the_interpreter_they_lead_to(tmp_path: Path) -> None:
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{PYTHON}" "$@"\n')
    shim.chmod(0o755)
    identify = re.search(r"^identify\(\) \{.*?^\}", (ROOT / "bench" / "run.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert identify is not None
    done = subprocess.run(
        ["bash", "-c", f'{identify[0]}\nidentify "{shim}"'], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split(None, 2)[:2] == [str(Path(PYTHON).resolve()), sys.version.split()[0]]

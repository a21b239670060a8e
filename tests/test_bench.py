"""The benchmark measures what it says: a short run of its own, and its parts on known input."""

from __future__ import annotations

import importlib.metadata
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import PYTHON, ROOT

sys.path.append(str(ROOT / "bench"))  # its modules import each other by their plain names

import arguments  # noqa: E402
import charts  # noqa: E402
import documents  # noqa: E402
import environment  # noqa: E402
import goals  # noqa: E402
import machine  # noqa: E402
import openloop  # noqa: E402
import parts  # noqa: E402
import quality  # noqa: E402
import report  # noqa: E402
import results as found  # noqa: E402
import stalls  # noqa: E402
import tables  # noqa: E402
from backends import Backends, fast_backends  # noqa: E402
from contenders import UPLOAD_PATH  # noqa: E402
from delay_backend import FIRST_STALL_SECONDS, Backend, parse  # noqa: E402
from loads import LOADS  # noqa: E402
from processes import BenchError  # noqa: E402
from report import OURS, Spread, latencies, missed_ratio, summarise  # noqa: E402
from results import ChoiceRun, Results, Run, Sample, StallRun, combine  # noqa: E402

# The whole command.


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, str(ROOT / "bench" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def runs_of(content: Any) -> list[Run]:
    return [Run.from_json(run) for run in content["runs"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Any]:
    """A run of all parts, as short as they can be."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    done = bench(
        "--contenders=balancer,baseline,nginx", "--loads=small-1,small-32,up-64k", "--rounds=1", "--seconds=1",
        "--stall-seconds=1", "--choice-seconds=1", f"--json={file}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.timeout(180)
def test_a_run_measures_every_contender_under_every_load(finished: tuple[Any, Any]) -> None:
    done, content = finished
    (run,) = runs_of(content)
    samples = run.samples
    expected = {(who, load) for who in ("balancer", "baseline", "nginx") for load in ("small-1", "small-32", "up-64k")}
    assert {(s.contender, s.load) for s in samples} == expected | {("direct", "small-1")}
    for sample in samples:
        assert sample.requests > 0 and sample.requests_per_second > 0
        assert (sample.cpu_us_per_request is None) is (sample.contender == "direct")
        assert sample.contender == "direct" or sample.peak_rss_bytes > 1 << 20
    for name, load in expected:
        assert any(line.split()[:2] == [name, load] for line in done.stdout.splitlines())


@pytest.mark.timeout(180)
def test_a_run_has_every_part(finished: tuple[Any, Any]) -> None:
    (results,) = runs_of(finished[1])
    assert [(run.contender, run.seconds) for run in results.stalls] == [("balancer", 1), ("nginx", 1)]
    assert all(run.requests > 0 and run.worst >= run.p50 > 0 and run.held == 0 for run in results.stalls)
    assert {(run.contender, run.method) for run in results.choices} == {
        *((OURS, name) for name in quality.REGISTRY if name not in quality.BLIND_STRATEGIES),
        ("nginx", "least_conn"),
    }
    assert all(run.direct_worst is not None and run.direct_worst > 0 for run in results.choices)
    assert {run.method for run in results.simulated} == set(quality.REGISTRY)


@pytest.mark.timeout(180)
def test_a_runs_file_fills_the_documentation(finished: tuple[Any, Any], tmp_path: Path) -> None:
    results = Results(runs_of(finished[1]))
    shutil.copy(documents.DOCS / documents.PAGE, tmp_path)
    written = documents.write(results, tmp_path)
    page = (tmp_path / documents.PAGE).read_text()
    assert tables.speed_table(results).markdown() in page
    assert found.read(tmp_path / documents.DATA) == results.runs
    for picture in (path.name for path in written if path.suffix == ".svg"):
        assert f"]({picture})" in page


def test_the_committed_page_says_what_the_committed_file_says() -> None:
    results = combine(found.read(documents.DOCS / documents.DATA))
    page = (documents.DOCS / documents.PAGE).read_text()
    assert documents.fill(page, results) == page
    for name, content in documents.plots(results).items():
        assert (documents.DOCS / name).read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders=apache"], "expected some of balancer"),
        (["--loads=small-2"], "small-2"),
        (["--require-ratio=2", "--contenders=balancer"], "baseline"),
        (["--render=/nowhere/results.json"], "/nowhere/results.json holds no results"),
        (["--transfer=much"], "not a size"),
        (["--python=/nowhere/python"], "/nowhere/python: no such program"),
        (["--python=false"], "Python 3.11 or newer is needed"),
        (["--json=/nowhere/results.json", "--contenders=balancer"], "/nowhere is no directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


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
        sock.settimeout(10)
        sock.sendall(b"x")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


# The slow backend.


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
            thread.join(5)


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
    assert len(stalls.late_windows(shots)) >= 1


def test_what_is_never_answered_has_failed_after_the_time_it_was_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        started = time.monotonic()
        (shots,) = openloop.fire([openloop.Aim(deaf.getsockname()[1], "/", [0.0, 0.1])], patience=0.3)
    assert time.monotonic() - started < 5
    assert [shot.is_good for shot in shots] == [False, False]
    assert all(0.2 < shot.latency < 5 for shot in shots)


def test_what_finds_no_connection_free_waits_for_one_and_has_not_failed() -> None:
    server = Sleepy(after=1, seconds=0.3)
    try:
        (shots,) = openloop.fire([openloop.Aim(server.port, "/", openloop.steady(100, 0.2))], most=2)
    finally:
        server.close()
    assert all(shot.is_good for shot in shots)
    assert [shot.was_held for shot in shots] == [number >= 2 for number in range(20)]
    assert openloop.figures(shots)["held"] == 18 and openloop.figures(shots)["failed"] == 0
    assert shots[2].latency > 0.2  # its wait is part of it


def test_what_is_held_leaves_when_connections_break() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (shots,) = openloop.fire([openloop.Aim(port, "/", [0.0] * 5)], patience=5, most=1)
    assert not any(shot.is_good for shot in shots) and [shot.was_held for shot in shots] == [False, *[True] * 4]
    assert all(shot.latency < 5 for shot in shots)  # each was refused, none was forgotten


def test_a_refused_connection_has_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (shots,) = openloop.fire([openloop.Aim(port, "/", [0.0])], patience=1)
    assert not shots[0].is_good


def test_poisson_traffic_is_the_same_for_the_same_seed() -> None:
    due = openloop.poisson(500, 20, seed=3)
    assert due == openloop.poisson(500, 20, seed=3) != openloop.poisson(500, 20, seed=4)
    assert due == sorted(due) and len(due) == pytest.approx(10000, rel=0.05)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (0.999, 100), (1.0, 100), (0.001, 1)])
def test_percentiles_are_of_nearest_rank(share: float, expected: int) -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(values)
    assert openloop.percentile(values, share) == expected


# Stalls.


def shots(*pairs: tuple[float, float]) -> list[openloop.Shot]:
    return [openloop.Shot(due, latency, True) for due, latency in pairs]


def test_late_answers_that_overlap_are_one_stall() -> None:
    late = shots((0.0, 0.01), (1.0, 0.5), (1.1, 0.4), (1.4, 0.2), (1.5, 0.01), (3.0, 0.06))
    assert stalls.late_windows(late) == [pytest.approx((1.0, 1.6)), pytest.approx((3.0, 3.06))]


@pytest.mark.parametrize(
    ("direct", "own"),
    [(shots((1.0, 0.001), (1.3, 0.001)), 1), (shots((1.2, 0.2)), 0), (shots((0.1, 0.2), (2.0, 0.2)), 1)],
)
def test_a_stall_is_its_own_unless_the_direct_way_was_late_too(direct: list[openloop.Shot], own: int) -> None:
    run = stalls.summarise("x", 100.0, 2.0, shots((0.5, 0.001), (1.0, 0.5)), direct, 0.0)
    assert (run.stalls, run.own_stalls) == (1, own)


# The choice.


@pytest.mark.parametrize("number", [0, 1])
def test_going_by_time_has_the_best_p99_with_unequal_backends(number: int) -> None:
    p99 = {name: quality.simulate(number, name, 120.0).p99 for name in quality.REGISTRY}
    best = p99["least_response_time"]
    assert best == min(p99.values())
    assert best < 0.75 * p99["least_connections"]  # which is what nginx and HAProxy do
    assert p99["peak_ewma"] < p99["least_connections"] < p99["round_robin"]


def test_a_simulation_can_be_replayed() -> None:
    assert quality.simulate(0, "power_of_two", 20.0) == quality.simulate(0, "power_of_two", 20.0)


# From samples to tables.


def sample(contender: str, cpu: float | None, number: int = 0, load: str = "small-1", **more: Any) -> Sample:
    fields: dict[str, Any] = {
        "requests": 1000, "errors": 0, "seconds": 1.0, "requests_per_second": 1000.0, "switches_per_request": 1.0,
        "p50_ms": 1.0, "p99_ms": 2.0, "peak_rss_bytes": 1 << 20, "forwarded_share": 1.0, "others_share": 0.0,
    }  # fmt: skip
    return Sample(round=number, contender=contender, load=load, cpu_us_per_request=cpu, **(fields | more))


def test_ratios_are_of_the_same_round() -> None:
    samples = [
        sample("balancer", 50.0), sample("nginx", 25.0), sample("baseline", 1000.0),
        sample("balancer", 500.0, 1), sample("nginx", 250.0, 1), sample("baseline", 10000.0, 1),
    ]  # fmt: skip
    by_name = {summary.contender: summary for summary in summarise(samples)}
    assert by_name["nginx"].our_ratio == Spread(2.0, 2.0, 2.0)
    assert by_name["balancer"].baseline_ratio == Spread(20.0, 20.0, 20.0)
    assert missed_ratio(samples, 20.0) == []
    assert "wanted at most 1/21" in missed_ratio(samples, 21.0)[0]


def test_added_latency_is_over_the_direct_way_of_the_same_round() -> None:
    samples = [
        sample("direct", None, p50_ms=0.1, p99_ms=0.2), sample("balancer", 1.0, p50_ms=0.4, p99_ms=1.0),
        sample("caddy", 1.0, p50_ms=0.3, p99_ms=0.6),
    ]  # fmt: skip
    ours = latencies(samples)[0]
    assert ours.contender == "balancer"
    assert ours.added["p50"] is not None and ours.added["p50"].median == pytest.approx(0.3)
    assert ours.ratio["p99"] is not None and ours.ratio["p99"].median == pytest.approx(2.0)


def test_a_contender_without_a_good_answer_has_errors_and_no_cost() -> None:
    samples = [sample("baseline", None, errors=5, requests=5, requests_per_second=0.0), sample("balancer", 1.0)]
    rows = tables.speed_table(Results([Run(samples=samples)])).rows
    assert rows[0][:5] == ["baseline", "small-1", "0", "5", "-"]
    assert missed_ratio(samples, 2.0) == ["balancer, small-1: no ratio, wanted at most 1/2"]


MACHINE = {
    "date": "2030-01-01", "commit": "abc1234", "cpu": "CPU", "cpus": 2, "kernel": "6",
    "python": {"version": "3.12.0", "build": "built somehow", "is_optimised": True, "step_ns": 400.0},
}  # fmt: skip
OPTIONS = {"rounds": 1, "seconds": 2, "choice_seconds": 9, "command": "./bench/run.sh"}


def stall(contender: str, **more: Any) -> StallRun:
    figures: dict[str, Any] = dict.fromkeys(("rate", "seconds", "p50", "p99", "p999", "worst", "direct_worst"), 1.0)
    counts = dict.fromkeys(("requests", "failed", "stalls", "own_stalls"), 0)
    return StallRun(contender, others_share=0.0, **(figures | counts | more))


def choice(contender: str, method: str, p99: float = 1.0, number: int = 0, **more: Any) -> ChoiceRun:
    fields: dict[str, Any] = {
        "requests": 10,
        "failed": 0,
        "p50": 1.0,
        "p999": 1.0,
        "shares": [1.0],
        "others_share": 0.0,
    }
    return ChoiceRun(round=number, contender=contender, method=method, p99=p99, **(fields | more))


def test_results_survive_the_file(tmp_path: Path) -> None:
    run = Run(MACHINE, OPTIONS, [sample("nginx", 1.0)], [stall("nginx")], [choice("nginx", "least_conn")])
    file = tmp_path / "results.json"
    file.write_text(documents.as_text(Results([run, run])))
    assert found.read(file) == [run, run]


def test_failures_and_late_direct_requests_are_warned_of() -> None:
    stalled = [stall("nginx"), stall("caddy", requests=9, failed=2, held=3), stall("haproxy", direct_worst=26.0)]
    choices = [choice("nginx", "a", failed=4), choice("nginx", "b", number=1, direct_worst=30.0), choice("nginx", "c")]
    told = report.warnings(Results([Run(MACHINE, OPTIONS, [], stalled, choices)]))
    assert [warning.partition(": ")[0] for warning in told] == [
        "stalls, caddy", "stalls, caddy", "stalls, haproxy", "choice, nginx a, round 1", "choice, nginx b, round 2",
    ]  # fmt: skip
    assert "2 of 9 requests failed" in told[0] and "3 of 9 requests left late" in told[1] and "26 ms" in told[2]


# Goals.


def reached(run: Run) -> dict[str, tuple[str, bool | None]]:
    return {goal.text: (goal.measured, goal.is_reached) for goal in goals.goals(Results([run]))}


def test_goals_go_by_the_median_of_the_rounds() -> None:
    cpu = {
        "balancer": (10.0, 13.0, 10.0),
        "caddy": (20.0, 20.0, 20.0),
        "nginx": (6.0, 6.0, 6.0),
        "baseline": (250.0,) * 3,
    }
    samples = [sample(who, cost, n, "small-1000") for who, costs in cpu.items() for n, cost in enumerate(costs)]
    found = reached(Run(MACHINE, OPTIONS, samples))
    assert found["CPU per request, small-1000: at most 0.6 x caddy's"] == ("0.50 (0.50..0.65)", True)
    assert found["CPU per request, small-1000: at most 1.5 x nginx's"] == ("1.67 (1.67..2.17)", False)
    assert found["CPU per request, small-1000: at most 1/25 of baseline's"] == ("1/25.0 (1/25.0..1/19.2)", True)
    assert found["CPU per request, small-32: at most 1.0 x caddy's"] == ("-", None)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, True),
        ({"stalls": 1}, True),  # the machine's
        ({"own_stalls": 1}, False),
        ({"failed": 1}, False),
        ({"seconds": 59.0}, None),  # too short to tell
        ({"seconds": 5.0, "own_stalls": 1}, False),
    ],
)
def test_the_goal_of_no_stalls(more: dict[str, Any], expected: bool | None) -> None:
    found = reached(
        Run(MACHINE, OPTIONS, [], [stall("caddy", own_stalls=9), stall(OURS, **({"seconds": 60.0} | more))])
    )
    assert found["no stall above 50 ms in 60 s at half load"][1] is expected


def test_the_best_strategy_is_compared_with_its_rivals_of_the_same_round() -> None:
    choices = [
        choice(OURS, "good", 300.0), choice(OURS, "bad", 900.0),
        choice("nginx", "least_conn", 400.0), choice("haproxy", "leastconn", 300.0),
        choice(OURS, "good", 500.0, 1), choice(OURS, "bad", 100.0, 1), choice("nginx", "least_conn", 500.0, 1),
    ]  # fmt: skip
    found = reached(Run(MACHINE, OPTIONS, [], [], choices))
    assert found["p99 with unequal backends, best strategy (good): below nginx's"] == ("0.88 (0.75..1.00)", True)
    assert found["p99 with unequal backends, best strategy (good): below haproxy's"] == ("1.00 (1.00..1.00)", False)


# Several runs, one page.


def test_files_of_several_runs_become_one_page_that_tells_them_apart() -> None:
    morning = Run(MACHINE, OPTIONS, [sample("balancer", 1.0), sample("nginx", 2.0)])
    evening = Run(
        MACHINE | {"commit": "def5678"},
        OPTIONS,
        [sample("balancer", 3.0, number, "small-32", others_share=0.07) for number in range(3)],
        [stall("balancer")],
    )
    both = combine([morning, evening])
    assert {(s.contender, s.load) for s in both.samples} == {
        ("balancer", "small-1"), ("nginx", "small-1"), ("balancer", "small-32"),
    }  # fmt: skip
    place, _, first, second = documents.about_runs(both).splitlines()
    assert place.endswith("on Python 3.12.0, built somehow:")  # said once
    assert "small-1 (1 round of 2 s)" in first and "abc1234" in first and "at most 0.0%" in first
    assert "small-32 (3 rounds of 2 s); stalls" in second and "def5678" in second and "at most 7.0%" in second
    assert all("400 ns" in line for line in (first, second))
    assert tables.choice_table(both).rows == [] and len(tables.summary_table(both).rows) == 2


def test_a_page_says_when_its_loads_do_not_compare() -> None:
    slower = MACHINE | {"python": MACHINE["python"] | {"step_ns": 500.0}}
    both = [Run(MACHINE, OPTIONS, [sample(OURS, 1.0)]), Run(slower, OPTIONS, [sample(OURS, 1.0, load="small-32")])]
    assert "differed by 25%" in documents.about_runs(Results(both)).splitlines()[-1]
    assert "differed" not in documents.about_runs(Results(both[:1] * 2))


def test_rounds_of_the_choice_are_those_that_were_measured() -> None:
    run = Run(MACHINE, OPTIONS, choices=[choice("nginx", "a"), choice("nginx", "a", number=1)])
    assert documents.covers(run) == "choice (2 rounds of 9 s)"


def test_what_was_measured_again_is_taken_whole_from_the_later_run() -> None:
    first = Run(
        MACHINE, OPTIONS, [sample("nginx", 1.0), sample("nginx", 1.0, 1), sample("nginx", 1.0, load="small-32")],
        [stall("nginx", worst=9.0), stall("caddy")], [choice("nginx", "a"), choice("nginx", "b")],
    )  # fmt: skip
    again = Run(MACHINE, OPTIONS, [sample("nginx", 2.0)], [stall("nginx", worst=1.0)], [choice("nginx", "b")])
    both = combine([first, again])
    assert [(s.load, s.cpu_us_per_request) for s in both.samples] == [("small-32", 1.0), ("small-1", 2.0)]
    assert [(run.contender, run.worst) for run in both.stalls] == [("caddy", 1.0), ("nginx", 1.0)]
    assert [run.method for run in both.choices] == ["a", "b"]
    assert combine([again, again]) == Results([again])  # nothing is left of the first: it is not named


def test_a_contender_is_not_lost_by_measuring_again_without_it() -> None:
    first = Run(MACHINE, OPTIONS, [sample("balancer", 1.0), sample("nginx", 1.0)])
    with pytest.raises(BenchError, match="small-1 was measured again without nginx"):
        combine([first, Run(MACHINE, OPTIONS, [sample("balancer", 1.0)])])


def test_a_page_without_a_marker_is_refused() -> None:
    with pytest.raises(BenchError, match="'runs'"):
        documents.fill("no markers here", Results([Run(MACHINE, OPTIONS)]))


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


@pytest.mark.timeout(180)
def test_a_run_tells_its_interpreter_and_warns_of_a_slow_build(finished: tuple[Any, Any]) -> None:
    done, content = finished
    (run,) = runs_of(content)
    assert run.machine["python"]["version"] == sys.version.split()[0] and run.machine["python"]["step_ns"] > 10
    assert done.stdout.splitlines()[0] == f"{machine.about(run.machine)}, {machine.pace(run.machine)}"
    assert {"nginx", "wrk", "Granian"} <= set(run.machine["versions"])
    assert f"Granian {importlib.metadata.version('granian')}" in machine.about(run.machine)
    slow = Run(MACHINE | {"python": MACHINE["python"] | {"is_optimised": False}}, OPTIONS)
    assert ["--python" in warning for warning in report.warnings(Results([slow]))] == [True]
    assert report.warnings(Results([Run(MACHINE, OPTIONS)])) == []


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
    assert arguments.parse(None, ["--loads=all"]).loads == list(LOADS)


def test_stalls_are_looked_for_a_minute_everywhere_and_every_text_says_how_long_a_run_takes() -> None:
    quick, full = arguments.parse(None, []), arguments.parse(None, ["--full"])
    assert [one.name for one in parts.searched(quick)] == ["balancer", "nginx", "haproxy", "caddy"]
    assert len(parts.searched(full)) == 6
    assert quick.stall_seconds == full.stall_seconds == goals.QUIET_SECONDS
    lengths = [f"{round(parts.expected_seconds(options) / 60 / unit) * unit} minutes" for options, unit in
               ((quick, 1), (full, 10))]  # fmt: skip
    texts = [
        bench("--help").stdout,
        (ROOT / "bench" / "README.md").read_text(),
        (documents.DOCS / documents.PAGE).read_text(),
    ]
    assert all(length in text for text in texts for length in lengths), lengths


def test_a_shim_and_a_link_are_the_interpreter_they_lead_to(tmp_path: Path) -> None:
    shim = tmp_path / "python"
    shim.write_text(f'#!/bin/sh\nexec "{PYTHON}" "$@"\n')
    shim.chmod(0o755)
    path, version = environment.identify(str(shim)).splitlines()[:2]
    assert (path, version) == (str(Path(PYTHON).resolve()), sys.version.splitlines()[0])


def test_a_chart_escapes_its_text_and_draws_no_bar_below_nothing() -> None:
    bars = [charts.Bar("<a&b>", Spread(-1.0, -2.0, 3.0)), charts.Bar("c", Spread(2.0, 2.0, 2.0), True)]
    text = charts.chart("x < y", "ms", [charts.Group("p50", bars)])
    assert "&lt;a&amp;b&gt;" in text and "x &lt; y" in text
    assert 'width="-' not in text and charts.OURS_COLOUR in text

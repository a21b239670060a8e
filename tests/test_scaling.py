"""Backends come and go with the requests: how many is decided by arithmetic, and no request is lost over it."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import psutil
import pytest
from exposition import scrape, value
from support import Balancer, BalancerProcess, Clock, active, fetch, fetch_json, options, wait_until

from balancer.balancing.backends import LastCheck
from balancer.balancing.options import PoolOptions
from balancer.balancing.pool import DEFAULT_POOL, BackendPool
from balancer.balancing.pools import Pools
from balancer.balancing.strategies import create
from balancer.config import settings
from balancer.config.scaling import ScalingSettings
from balancer.config.settings import Settings
from balancer.errors import SettingsError
from balancer.fleet.discovery import SourceFailed
from balancer.fleet.scaling import Demand, Load, Starts
from balancer.fleet.started import StartedBackends
from balancer.protocol.origin import Origin
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

REQUEST = Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", "127.0.0.1", [(b"host", b"a")])
BACKEND = Path(__file__).with_name("scaled_backend.py")


def command(*flags: str) -> str:
    return f"'{sys.executable}' '{BACKEND}' --port {{port}} --id {{id}} {' '.join(flags)}"


def scaling_options(**table: Any) -> ScalingSettings:
    (made,) = Settings(scaling=[{"command": "x {port}", "max": 6, **table}]).scaling  # type: ignore[list-item]
    return made


# The decision.


@pytest.mark.parametrize(
    ("load", "wanted", "why"),
    [
        (Load(0, 0, 0), 1, "0 in flight + 0 waiting over 0 healthy, target 4: 0 -> 1, min 1"),
        (Load(12, 3, 2), 4, "12 in flight + 3 waiting over 2 healthy = 7.5 each, target 4: 2 -> 4"),
        (Load(12, 3, 2, 2), 4, "12 in flight + 3 waiting over 2 healthy and 2 starting = 3.8 each, target 4: 4 stay"),
        (Load(99, 0, 2), 6, "99 in flight + 0 waiting over 2 healthy = 49.5 each, target 4: 2 -> 6, max 6"),
        (Load(13, 0, 3), 3, "13 in flight + 0 waiting over 3 healthy = 4.3 each, target 4: 3 stay"),  # 8 % too many
        (Load(14, 0, 3), 4, "14 in flight + 0 waiting over 3 healthy = 4.7 each, target 4: 3 -> 4"),
        (Load(2, 0, 3), 3, "2 in flight + 0 waiting over 3 healthy = 0.7 each, target 4: 3 stay, 1 in 300 s"),
        (Load(2, 0, 8), 6, "2 in flight + 0 waiting over 8 healthy = 0.2 each, target 4: 8 -> 6, max 6"),
        (Load(0, 0, 8, fixed=7), 7, "0 in flight + 0 waiting over 8 healthy = 0 each, target 4: 8 -> 7"),
    ],
)
def test_the_number_wanted_follows_from_the_work(load: Load, wanted: int, why: str) -> None:
    demand = Demand(scaling_options())
    assert demand.wanted(load, 0.0) == wanted
    assert demand.why.startswith(why)


def test_the_first_request_counts_at_once() -> None:
    demand = Demand(scaling_options(min=0))
    assert [demand.wanted(Load(0, 0, 0), second / 10) for second in range(20)] == [0] * 20
    assert demand.wanted(Load(0, 9, 0), 2.0) == 3


def test_fewer_only_when_no_more_were_needed_all_the_time() -> None:
    demand = Demand(scaling_options(down_after=10))
    seen = []
    for second in range(40):
        work = {8: 11, 9: 11, 10: 11}.get(second, 3)  # a peak, which needs 3 of 4
        seen.append(demand.wanted(Load(work, 0, 4), float(second)))
    # Four at the start; three were needed on average until second 11, two in second 12.
    assert seen == [4] * 10 + [3] * 11 + [2] + [1] * 18


def simulated(demand: Demand, arrivals: list[float], seconds: float, starts_in: int) -> list[tuple[float, int, int]]:
    """(requests in flight, healthy, starting) of each second, by Little's law: each takes so many seconds, and one
    backend has 8 at the same time. Nobody is stopped before it is healthy."""
    curve = []
    healthy, starting = 0, list[int]()
    for second, rate in enumerate(arrivals):
        healthy += sum(at <= second for at in starting)
        starting = [at for at in starting if at > second]
        work = rate * seconds
        in_flight = min(work, 8 * healthy)
        load = Load(round(in_flight), round(work - in_flight), healthy, len(starting))
        wanted = demand.wanted(load, float(second))
        curve.append((work, healthy, len(starting)))
        starting += [second + starts_in] * (wanted - load.there)
        healthy -= max(0, load.there - wanted)
    return curve


def test_the_curve_follows_the_load_without_flapping() -> None:
    arrivals = [0] * 10 + [40 + 10 * (second % 2) for second in range(120)] + [160] * 60 + [2] * 180
    curve = simulated(Demand(scaling_options(max=12, down_after=60)), arrivals, 0.2, starts_in=3)
    counts = [healthy for _, healthy, _ in curve]
    assert max(healthy + starting for _, healthy, starting in curve) == ceil(160 * 0.2 / 4)
    assert counts[120] == 3  # 8 to 10 in flight
    assert counts[140] == counts[189] == 8  # 32 in flight, ten seconds after it began
    assert counts[190 + 59] == 8
    assert counts[-1] == 1
    steps = [after - before for before, after in zip(counts, counts[1:], strict=False) if after != before]
    assert [step > 0 for step in steps] == sorted((step > 0 for step in steps), reverse=True), steps


def test_failures_in_a_row_make_the_next_start_wait_longer() -> None:
    starts, waits, now = Starts(), [], 0.0
    for _ in range(9):
        starts.fail("gone", now)
        starts.fail("gone", now)  # started together with it
        began = now
        while not starts.are_due(now):
            now += 0.5
        waits.append(now - began)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (starts.failed, starts.failed_in_row) == (18, 9)
    starts.succeeded()
    starts.fail("gone", now)
    assert not starts.are_due(now + 0.9) and starts.are_due(now + 1)


# Backends that are started one by one.


class Launched:
    """Starts nothing, and says what it was asked for."""

    def __init__(self, left: Mapping[str, Origin]) -> None:
        self.left = left
        self.running: list[str] = []
        self.dead: dict[str, str] = {}
        self.refusal = ""
        self.options = scaling_options()

    def found(self) -> Mapping[str, Origin]:
        self.running += self.left
        return self.left

    def start(self, backend_id: str) -> Origin:
        if self.refusal:
            raise SourceFailed(self.refusal)
        self.running.append(backend_id)
        return Origin("http", "127.0.0.1", 9)

    def ended(self) -> Mapping[str, str]:
        return self.dead

    def stop(self, backend_id: str) -> None:
        self.running.remove(backend_id)
        self.dead.pop(backend_id, None)

    def close(self) -> None:
        self.running.clear()


class Trial:
    """A pool, and what brings it backends."""

    def __init__(self, left: Mapping[str, Origin] | None = None, **table: Any) -> None:
        self.clock = Clock(100.0)
        self.launcher, self.starts = Launched(left or {}), Starts()
        self.events: list[tuple[str, str | None]] = []
        self.pool = BackendPool(create("round_robin"), options(PoolOptions, slow_start=1), clock=self.clock)
        pools = Pools()
        pools.apply({DEFAULT_POOL: self.pool}, {})
        self.started = StartedBackends(
            self.pool,
            pools,
            scaling_options(**table),
            self.launcher,
            self.starts,
            lambda kind, pool, backend, text: self.events.append((kind, backend)),
            self.clock,
        )
        self.started.adopt()

    def scale(self, wanted: int) -> None:
        self.started.scale(self.started.load(), wanted, "")

    def check(self, *backends: str, error: str | None = None) -> None:
        for backend in self.pool.backends():
            if backend.id in backends:
                self.pool.record_check(backend, LastCheck(1.0, 0.01, None if error else 200, error))

    def tend(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        self.started.tend()

    @property
    def states(self) -> dict[str, str]:
        return {backend.id: backend.state for backend in self.pool.backends()}


def busy(trial: Trial, backend_id: str) -> Any:
    """A request in flight there."""
    (backend,) = [backend for backend in trial.pool.backends() if backend.id == backend_id]
    others = [each.id for each in trial.pool.backends() if each is not backend]
    return trial.pool.lease(REQUEST, others)


def test_one_that_starts_is_down_only_when_it_was_up() -> None:
    trial = Trial()
    trial.scale(1)
    trial.check("backend_1", error="refused")
    assert trial.states == {"backend_1": "unknown"}
    assert trial.pool.backends()[0].health.reason == "refused"
    trial.check("backend_1")
    assert trial.pool.backends()[0].slow_start.began_at == trial.clock()
    trial.check("backend_1", error="refused")
    trial.check("backend_1", error="refused")
    assert trial.states == {"backend_1": "down"}


def test_the_least_busy_drains_and_is_stopped_after_its_last_request() -> None:
    trial = Trial()
    trial.scale(3)
    trial.check("backend_1", "backend_2", "backend_3")
    first, third = busy(trial, "backend_1"), busy(trial, "backend_3")
    trial.scale(2)
    assert trial.states == {"backend_1": "up", "backend_3": "up"}
    trial.scale(1)  # of those with as many requests the newest, but these are of one age
    (leaving,) = [backend_id for backend_id, state in trial.states.items() if state == "drain"]
    trial.tend()
    assert sorted(trial.launcher.running) == ["backend_1", "backend_3"]
    assert trial.started.load().in_flight == 1
    (first if leaving == "backend_1" else third).release()
    trial.tend()
    assert trial.launcher.running == [{"backend_1": "backend_3", "backend_3": "backend_1"}[leaving]]
    assert [kind for kind, _ in trial.events] == ["scaled_up", "scaled_down", "scaled_down"]
    (third if leaving == "backend_1" else first).release()


@pytest.mark.parametrize("ends", ["request", "time"])
def test_one_whose_name_the_configuration_takes_has_its_last_requests_answered(ends: str) -> None:
    trial = Trial()
    trial.scale(1)
    trial.check("backend_1")
    lease = busy(trial, "backend_1")
    trial.pool.backends()[0].source = "file"
    trial.tend()
    assert trial.launcher.running == ["backend_1"] and not trial.started.is_empty
    if ends == "request":
        lease.release()
    trial.tend(1 if ends == "request" else 31)
    assert trial.launcher.running == [] and trial.started.is_empty
    lease.release()


def test_one_that_is_never_healthy_or_ends_is_a_failed_start() -> None:
    trial = Trial(start_timeout=5)
    trial.scale(2)
    trial.launcher.dead["backend_1"] = "exit code 3: no licence"
    trial.tend(3)
    assert trial.states == {"backend_2": "unknown"}
    assert trial.starts.last_error == "backend_1: ended after 3 s: exit code 3: no licence"
    trial.check("backend_2", error="answered 503")
    trial.tend(3)
    assert trial.starts.last_error == "backend_2: not healthy within 5 s: answered 503"
    trial.tend()
    assert trial.states == {} and trial.launcher.running == [] and trial.starts.failed == 2
    trial.scale(4)
    assert list(trial.states) == ["backend_1"]  # one at a time, to see whether it goes
    trial.check("backend_1")
    trial.tend(11)
    assert trial.starts.failed_in_row == 0
    trial.launcher.dead["backend_1"] = "killed by SIGKILL"
    trial.tend()
    assert trial.events[-1] == ("backend_ended", "backend_1") and trial.starts.failed == 2


def test_what_cannot_be_started_is_told() -> None:
    trial = Trial()
    trial.launcher.refusal = "the image is not there"
    trial.scale(2)
    assert trial.events == [("scaled_up", None), ("start_failed", "backend_1"), ("start_failed", "backend_1")]
    assert trial.states == {} and trial.starts.started == 0


def test_there_are_never_more_than_max_whatever_their_health() -> None:
    trial = Trial(max=3)
    trial.scale(3)
    trial.check("backend_1", "backend_2", "backend_3")
    trial.check("backend_1", error="x")
    trial.check("backend_1", error="x")
    assert trial.started.load().there == 2
    trial.scale(3)
    assert len(trial.states) == 3


def test_what_an_earlier_balancer_has_left_is_taken_over() -> None:
    trial = Trial(left={"backend_2": Origin("http", "127.0.0.1", 9)})
    assert trial.states == {"backend_2": "unknown"}
    trial.scale(2)
    assert list(trial.states) == ["backend_2", "backend_1"]


# Real processes.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a tenth of one."""
    for name, seconds in (
        ("scaler.LOOK_SECONDS", 0.1),
        ("scaling.AVERAGED_SECONDS", 0.3),
        ("scaling.BACKOFF_SECONDS", 0.2),
        ("started.STEADY_SECONDS", 0.2),
    ):
        monkeypatch.setattr(f"balancer.fleet.{name}", seconds)


def written(folder: Path, **table: Any) -> Path:
    """A configuration; None leaves a key out."""
    table = {"pool": "default", "max": 4, "command": command(), "start_timeout": 60, **table}
    lines = [f"{key} = {json.dumps(each)}" for key, each in table.items() if each is not None]
    file = folder / "balancer.toml"
    patient = ["health_interval = 0.1", "health_timeout = 5", "queue_timeout = 60"]
    file.write_text("\n".join([*patient, "[[scaling]]", *lines]), encoding="utf-8")
    return file


@contextmanager
def scaled(folder: Path, *flags: str, **table: Any) -> Iterator[Balancer]:
    with Balancer(f"--config={written(folder, **table)}", *flags) as balancer:
        yield balancer


def seen(balancer: Any) -> dict[str, Any]:
    (found,) = balancer.status()["scaling"]
    return found  # type: ignore[no-any-return]


def healthy(balancer: Any) -> int:
    return sum(backend["healthy"] for backend in balancer.status()["backend_servers"])


def kinds(balancer: Any) -> Counter[str]:
    return Counter(event["kind"] for event in fetch_json(f"{balancer.url}/events")["events"])


def ours() -> list[psutil.Process]:
    """What was started for this test, and its children."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if str(BACKEND) in (process.info["cmdline"] or ()) or "stubborn" in str(process.info["cmdline"])
    ]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    wait_until(lambda: not ours(), "all backends have ended")


class Clients:
    """So many, each of which sends one request after another."""

    def __init__(self, url: str, count: int) -> None:
        self.answers: Counter[int] = Counter()
        self._url = url
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="client") for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._ending.is_set():
            self.answers[fetch(f"{self._url}/x")[0]] += 1

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


def test_backends_come_and_go_with_the_load_and_no_request_is_lost(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, command=command("--delay", "0.2"), down_after=1) as balancer:
        assert healthy(balancer) == 1  # ready means that
        assert balancer.status()["backend_servers"][0]["source"] == "scaling"
        clients = Clients(balancer.url, 12)
        wait_until(lambda: healthy(balancer) == 3, "12 requests in flight have three backends")
        clients.stop()
        slow = Clients(balancer.url, 1)
        wait_until(lambda: len(ours()) == 1, "the others are stopped again")
        slow.stop()
        assert set(clients.answers + slow.answers) == {200}
        told = [
            event["message"] for event in fetch_json(f"{balancer.url}/events")["events"] if "scaled" in event["kind"]
        ]
        assert any(" each, target 4: " in text and "-> 3" in text for text in told), told
        assert re.search("-> 1(, min 1)?, no more were needed for 1 s$", told[-1])
        samples = scrape(balancer.url)
        assert value(samples, "lb_scaling_wanted", pool="default") == 1
        assert value(samples, "lb_scaling_started_total", pool="default") >= 3
        assert value(samples, "lb_scaling_failed_starts_total", pool="default") == 0


def test_the_first_request_waits_while_a_backend_starts(quick: None, tmp_path: Path) -> None:
    in_path = f"python '{BACKEND}' --port {{port}} --id {{id}}"  # the one that runs the balancer
    with scaled(tmp_path, min=0, down_after=0.5, command=in_path) as balancer:
        for _ in range(2):
            assert (seen(balancer)["wanted"], len(ours())) == (0, 0)
            assert fetch(f"{balancer.url}/x")[::2] == (200, b"backend_1")
            wait_until(lambda: not ours() and seen(balancer)["wanted"] == 0, "nobody is left when nobody asks")


def test_who_comes_just_after_the_last_backend_has_gone_waits_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("balancer.fleet.scaling.AVERAGED_SECONDS", 0.1)  # but a look takes its second
    with scaled(tmp_path, min=0, max=1, down_after=0) as balancer:
        for _ in range(2):
            assert fetch(f"{balancer.url}/x")[0] == 200
            wait_until(lambda: not balancer.status()["backend_servers"], "nobody is left when nobody asks")


def test_one_that_is_killed_is_replaced(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, min=2, command=command("--child")) as balancer:
        wait_until(lambda: kinds(balancer)["backend_up"] == 2 and len(ours()) == 4, "two backends, and their children")
        victim = next(process for process in ours() if "backend_1" in process.cmdline())
        victim.kill()
        wait_until(lambda: not victim.is_running() and healthy(balancer) == 2 and len(ours()) == 4, "another one runs")
        assert kinds(balancer)["backend_ended"] + kinds(balancer)["start_failed"] == 1
        assert not [process for process in psutil.Process().children(recursive=True) if process.status() == "zombie"]


def test_failed_starts_are_counted_and_wait_longer_and_requests_do_not_wait_for_them(
    quick: None, tmp_path: Path
) -> None:
    with scaled(tmp_path, command=command("--fail")) as balancer:
        wait_until(lambda: seen(balancer)["failed_starts"] == 2, "two starts have failed")
        assert seen(balancer)["last_error"].endswith("exit code 3: no licence")
        assert fetch(f"{balancer.url}/x")[0] == 503
        written(tmp_path, command=command())
        assert fetch(f"{balancer.url}/reload", {}, "POST")[0] == 200
        wait_until(lambda: healthy(balancer) == 1, "a command that works is tried next")
    with scaled(tmp_path, command="no-such-program {port}") as balancer:
        wait_until(lambda: seen(balancer)["failed_starts"], "there is no such program")
        assert "cannot be started: No such file" in seen(balancer)["last_error"]


def test_where_nobody_is_left_a_request_has_the_next_start_tried(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, min=0, command=command("--fail")) as balancer:
        assert fetch(f"{balancer.url}/x")[0] == 503
        wait_until(lambda: fetch(f"{balancer.url}/x")[0] == 503 and seen(balancer)["failed_starts"] > 1, "another try")
        written(tmp_path, min=0)
        assert fetch(f"{balancer.url}/reload", {}, "POST")[0] == 200
        wait_until(lambda: fetch(f"{balancer.url}/x")[0] == 200, "what works now is tried")


def test_one_that_does_not_become_healthy_is_given_up(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, command=command("--sick"), start_timeout=2) as balancer:
        why = "not healthy within 2 s: health check answered 503"
        wait_until(lambda: (seen(balancer)["last_error"] or "").endswith(why), "its time is over")
        assert kinds(balancer)["backend_down"] == 0


def test_in_shadow_mode_it_only_says_what_it_would_do(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, mode="shadow", min=2) as balancer:
        wait_until(lambda: kinds(balancer)["scaling_advised"] == 1, "it is told")
        assert (seen(balancer)["wanted"], balancer.status()["backend_servers"], ours()) == (2, [], [])
        assert fetch(f"{balancer.url}/x")[0] == 503


def test_a_reload_changes_how_a_pool_is_scaled_and_without_it_all_drain(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, min=1) as balancer:
        written(tmp_path, min=3)
        changes = fetch_json(f"{balancer.url}/reload", {}, "POST")["changes"]
        assert [change["what"] for change in changes] == ["scaling.default"]
        wait_until(lambda: healthy(balancer) == 3, "there are three now")
        (tmp_path / "balancer.toml").write_text("backends = []", encoding="utf-8")
        assert fetch_json(f"{balancer.url}/reload", {}, "POST")["kept"] == []
        wait_until(lambda: not ours() and balancer.status()["backend_servers"] == [], "nobody starts any")
        assert balancer.status()["scaling"] == []


def test_backends_of_a_pool_that_leaves_are_stopped(quick: None, tmp_path: Path) -> None:
    top = '[[pools]]\nname = "api"\n[[routes]]\nname = "all"\npool = "api"\n'
    file = tmp_path / "balancer.toml"
    table = f'[[scaling]]\npool = "api"\nmax = 2\ncommand = {json.dumps(command())}\n'
    file.write_text(top + table, encoding="utf-8")
    with Balancer(f"--config={file}") as balancer:
        assert fetch(f"{balancer.url}/x")[::2] == (200, b"api_1")
        file.write_text("backends = []", encoding="utf-8")
        assert fetch(f"{balancer.url}/reload", {}, "POST")[0] == 200
        wait_until(lambda: not ours(), "its backends have ended")


def test_the_operator_may_remove_one_and_another_takes_its_place(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, "--state-file", str(tmp_path / "state.db")) as balancer:
        (first,) = ours()
        assert fetch(f"{balancer.url}/backends/backend_1", method="DELETE")[0] == 200
        wait_until(lambda: not first.is_running() and healthy(balancer) == 1, "another one runs")
        settings_told = fetch_json(f"{balancer.url}/config")["settings"]
        assert not [row["name"] for row in settings_told if row["name"].startswith("backends.")]  # no decision


# However the balancer ends.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_balancer(tmp_path: Path, number: signal.Signals) -> None:
    file = written(tmp_path, min=2, command=command("--child", "--delay", "2"))
    with BalancerProcess(f"--config={file}") as balancer, ThreadPoolExecutor(1) as clients:
        assert len(ours()) == 4
        assert {len(process.cpu_affinity()) for process in ours()} == {len(psutil.Process().cpu_affinity())}
        children = psutil.Process(balancer.pid).children(recursive=True)
        answer = clients.submit(fetch, f"{balancer.url}/x")
        wait_until(lambda: active(balancer) == 1, "a request is in flight")
        balancer.send(number)
        balancer.wait()
        wait_until(lambda: not any(process.is_running() for process in children), "all have ended")
        is_answered = answer.exception() is None and answer.result()[0] == 200
        assert is_answered is (number == signal.SIGTERM)


def test_what_has_moved_to_another_session_ends_with_its_own_backend_alone(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, min=2, command=command("--daemon")) as balancer:
        wait_until(lambda: healthy(balancer) == 2 and len(ours()) == 4, "two backends, and their children")
        first, second = (each for each in ours() if "stubborn" in str(each.cmdline()))
        victim = first.parent()
        assert victim is not None
        victim.kill()
        wait_until(lambda: not first.is_running() and healthy(balancer) == 2 and len(ours()) == 4, "another one runs")
        assert second.is_running()
        assert not [process for process in psutil.Process().children(recursive=True) if process.status() == "zombie"]


def test_of_several_workers_each_waits_for_what_the_master_starts(tmp_path: Path) -> None:
    file = written(tmp_path, min=0, max=2, command=command("--delay", "0.1"))
    with BalancerProcess(f"--config={file}", "--workers=2") as balancer:
        assert ours() == []
        clients = Clients(balancer.url, 6)
        wait_until(lambda: healthy(balancer) == 2, "six in flight at two workers have two backends")
        clients.stop()
        assert set(clients.answers) == {200}
        children = psutil.Process(balancer.pid).children(recursive=True)
        balancer.send(signal.SIGKILL)
        balancer.wait()
        wait_until(lambda: not any(process.is_running() for process in children), "workers and backends have ended")


def test_a_keeper_that_is_killed_takes_its_backends_with_it_and_another_begins(quick: None, tmp_path: Path) -> None:
    with scaled(tmp_path, command=command("--child")) as balancer:
        wait_until(lambda: len(ours()) == 2, "a backend, and its child")
        before = ours()
        (keeper,) = psutil.Process().children()
        keeper.kill()
        wait_until(lambda: len(ours()) == 2 and healthy(balancer) == 1 and not {*ours()} & {*before}, "a new one runs")


# What is wrong with a table.


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({}, "has nobody who starts backends; expected one of command, docker_image, kubernetes, webhook"),
        ({"command": "a {port}", "webhook": "http://a/"}, "has command and webhook; expected one of"),
        ({"command": "a --port 80"}, "does not say where to listen; expected {port} among its words"),
        ({"command": "a '{port}"}, "No closing quotation; expected the words of a command as in a shell"),
        ({"kubernetes": "api"}, "expected deployment/NAME"),
        ({"webhook": "ftp://a"}, "expected http://HOST:PORT/PATH or https://..."),
        ({"command": "a {port}", "min": 9}, "min = 9 is more than max = 6"),
        ({"command": "a {port}", "docker_port": 80}, "docker_port and docker_network belong to docker_image"),
        ({"command": "a {port}", "pool": "api"}, "scaling: pool 'api' is unknown; there are: default"),
        (
            {"command": "a {port}", "max": 0},
            "scaling.default.max = 0 (program): expected a whole number from 1 to 1000",
        ),
        ({"command": "a {port}", "max": None}, "scaling.default.max (program): is missing"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line(table: dict[str, Any], complaint: str) -> None:
    given = {key: each for key, each in {"pool": "default", "max": 6, **table}.items() if each is not None}
    with pytest.raises(SettingsError, match=".*") as refused:
        settings.given({"scaling": [given]})
    assert complaint in str(refused.value) and "\n" not in str(refused.value)


def test_a_pool_is_scaled_once() -> None:
    table = {"max": 2, "command": "a {port}"}
    with pytest.raises(SettingsError, match="two have the name 'default'"):
        settings.given({"scaling": [table, table]})


def test_the_demos_backends_are_not_added_to_those_that_scaling_starts() -> None:
    config, _ = settings.given({"scaling": [{"max": 2, "command": "a {port}"}]})
    assert config.backends == () and config.has_default_pool

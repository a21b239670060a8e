"""Numbers that processes share: loads, so that choices and limits hold over all of them, and records of requests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_worker import add, make_pool
from support import PYTHON, ROOT, make_attempt, make_record, running, wait_until

from balancer.balancing.backends import Backend, Choice, Scene
from balancer.balancing.members import PoolChanges
from balancer.balancing.pool import BackendPool
from balancer.balancing.shared import SLOTS, SharedLoads
from balancer.observe.canary import Canaries
from balancer.observe.record import Attempt
from balancer.observe.reports import DROPPED, Collector, Ledger, Reports
from balancer.observe.ring import Ring
from balancer.observe.routecounts import RouteCounts
from balancer.observe.statistics import Statistics
from balancer.observe.websockets import WebSocketRecord
from balancer.protocol.origin import Origin

WORKER = Path(__file__).with_name("shared_worker.py")
NAMES = ("a", "b", "c")
RECORDS: list[dict[str, Any]] = [
    {"backend": "a", "attempts": [make_attempt("a", "200")]},
    {"backend": "b", "attempts": [make_attempt("a", "connect_failed"), make_attempt("b", "200", connect=0.1)]},
    {"backend": "b", "status": 502, "reason": "connection_terminated", "attempts": [make_attempt("b", "200")]},
    {"backend": None, "status": 429, "reason": "limited", "method": "POST", "bytes_in": 7},
    {"backend": "a", "status": 499, "reason": "client_gone", "complete": False, "attempts": [make_attempt("a", "")]},
    {"backend": "a", "queued": 0.25, "bytes_out": 9, "method": "ODD", "attempts": [make_attempt("a", "404")]},
]


class Worker:
    """A process as a worker is one, which does what it is told."""

    def __init__(self, process: subprocess.Popen[str], ledger: Ledger) -> None:
        self.process = process
        self.ledger = ledger

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def told(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, line: str) -> str:
        self.tell(line)
        return self.told()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Master:
    """Their master: has given out the memory, and sees all."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._rows = count()
        self.loads = SharedLoads()
        self.statistics = Statistics()
        self.collector = Collector(self.statistics, RouteCounts(), Canaries(lambda kind, text: None))

    def pool(self, *names: str) -> BackendPool:
        self.names = names
        return make_pool(self.loads.of("default"), names)

    def start(self, workers: int, algorithm: str = "least_connections", limit: int = 0) -> list[Worker]:
        started = []
        for row in range(workers):
            ledger = Ledger()
            self.loads.forget(row)
            self.collector.add(ledger)
            command = map(str, (PYTHON, WORKER, self.loads.fd, ledger.fd, row, algorithm, limit, *self.names))
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            kept, env = (self.loads.fd, ledger.fd), os.environ | {"PYTHONPATH": str(ROOT)}
            process = self._stack.enter_context(running([*command], pass_fds=kept, env=env, **pipes))
            started.append(Worker(process, ledger))
        for worker in started:
            worker.do("0")  # it has begun
        return started


@pytest.fixture
def master() -> Iterator[Master]:
    with ExitStack() as stack:
        yield Master(stack)


# Loads.


def test_the_fewest_of_all_processes_gets_the_next(master: Master) -> None:
    """In step, and after one of them was killed: what it had counts no more."""
    pool = master.pool(*NAMES)
    workers = master.start(4)
    chosen = [worker.do("lease()") for _ in range(3) for worker in workers]
    for round_ in range(0, 12, 3):
        assert sorted(chosen[round_ : round_ + 3]) == ["'a'", "'b'", "'c'"]
    assert [view["active_connections"] for view in pool.snapshot()] == [4, 4, 4]

    freed = [workers[1].do("leases[0].backend.id"), workers[1].do("release()")][0]
    assert workers[3].do("lease()") == freed

    workers[0].kill()
    master.loads.forget(0)
    left = [view["active_connections"] for view in pool.snapshot()]
    assert sum(left) == 9
    for _ in range(3):  # those that it had are the first to fill up
        lowest = {f"'{name}'" for name, active in zip(NAMES, left, strict=True) if active == min(left)}
        got = workers[2].do("lease()")
        assert got in lowest
        left = [view["active_connections"] for view in pool.snapshot()]
    assert workers[3].do("active()") == str(left)


@pytest.mark.parametrize("algorithm", ["least_connections", "peak_ewma"])
def test_who_never_chooses_keeps_no_more_with_each_look(algorithm: str) -> None:
    """A master, and a worker to whom nobody comes: what others had in flight piled up for their next choice."""
    master = SharedLoads()
    watching = make_pool(master.of("default"), NAMES, algorithm)
    for row in range(2):
        master.forget(row)
    busy, idle = (make_pool(SharedLoads(master.fd, row).of("default"), NAMES, algorithm) for row in range(2))
    for pool in (watching, idle):
        for _ in range(100):
            lease = busy.lease_now(None)  # type: ignore[arg-type]
            assert lease is not None
            pool.sweep()
            lease.release(0.01)
            pool.sweep()
        assert len(pool._scene.changes) < 50 and len(pool._strategy._heap) < 50  # type: ignore[attr-defined]
    assert idle.lease_now(None) is not None  # type: ignore[arg-type]


def test_a_limit_holds_over_processes(master: Master) -> None:
    """Each may add one before it has seen what another has just added."""
    pool = master.pool("a", "b")
    workers = master.start(3, limit=3)
    for worker in workers:
        worker.tell("storm(150, 8)")
    for worker in workers:
        worker.told()
    assert max(int(worker.do("worker.most")) for worker in workers) <= 3 + 2
    assert [view["active_connections"] for view in pool.snapshot()] == [0, 0]
    assert pool.waiting == 0
    master.collector.take()
    assert master.statistics.snapshot()[0]["total_requests"] == 3 * 8 * 150


def test_who_waits_is_served_when_another_process_gives_its_place_back(master: Master) -> None:
    pool = master.pool("a")
    first, second = master.start(2, limit=1)
    first.do("lease()")
    second.do("lease_later()")
    wait_until(lambda: pool.waiting == 1, "in the queue of the second")
    first.do("release()")
    wait_until(lambda: second.do("len(leases)") == "1", "served")
    assert first.do("active()") == "[1]"
    assert pool.waiting == 0


def test_response_times_of_all_processes_are_gone_by(master: Master) -> None:
    master.pool(*NAMES)
    first, second = master.start(2, algorithm="least_response_time")
    for _ in NAMES:
        first.do("release(5.0 if lease() == 'a' else 0.001)")
    assert {second.do("lease()") for _ in range(4)} == {"'b'", "'c'"}


def test_who_owes_an_answer_is_known_to_all(master: Master) -> None:
    """Whichever way a request comes to its end."""
    master.pool("a")
    pool, other = (in_process(master, row, "a", algorithm="peak_ewma") for row in range(2))
    leases = [pool.lease(None) for _ in range(5)]
    assert unanswered(other) == 5
    leases[0].answered(0.01)
    assert unanswered(other) == 4
    leases[1].drop(is_late=False)
    leases[2].release(0.01)
    leases[3].release(failure="broke")
    assert unanswered(other) == 1
    pool.update("a", {"origin": Origin("http", "127.0.0.1", 2)})  # where it owes nothing
    assert unanswered(other) == 0
    leases[4].release()
    assert unanswered(other) == 0


def unanswered(pool: BackendPool) -> int:
    [backend] = pool.backends()
    return backend.speed.unanswered


def in_process(master: Master, row: int, *names: str, algorithm: str = "least_connections") -> BackendPool:
    master.loads.forget(row)
    return make_pool(SharedLoads(master.loads.fd, row).of("default"), names, algorithm)


def test_a_place_that_is_used_again_has_nothing_of_who_had_it_before(master: Master) -> None:
    pool = master.pool("a", "b")
    worker = in_process(master, 0, "a", "b")
    leases = [worker.lease(None) for _ in range(4)]
    for each in (pool, worker):  # it leaves with requests in flight, and another one of its name comes at once
        each.replace("a")
        add(each, "a")
    assert [(backend.id, backend.active) for backend in worker.backends()] == [("b", 2), ("a", 0)]
    leases.append(worker.lease(None))
    assert leases[-1].backend is worker.get("a")
    for number in range(SLOTS):  # until each slot was somebody's
        for each in (pool, worker):
            add(each, f"c{number}")
            each.remove(f"c{number}")
    assert [(backend.id, backend.active) for backend in pool.backends()] == [("b", 2), ("a", 1)]
    for lease in leases:
        lease.release()
    assert [(backend.id, backend.active) for backend in pool.backends()] == [("b", 0), ("a", 0)]


def test_what_drains_is_gone_when_the_last_process_is_through(master: Master) -> None:
    pool = master.pool("a", "b")
    workers = [in_process(master, row, "a", "b") for row in range(2)]
    leases = [worker.lease(None) for worker in workers for _ in range(2)]
    for each in (pool, *workers):
        each.remove("a")
    for lease in [lease for lease in leases if lease.backend.id == "a"]:
        assert pool.get("a") is not None
        lease.release()
        pool.sweep()
    for worker in workers:
        worker.sweep()
    assert [each.get("a") for each in (pool, *workers)] == [None, None, None]


def test_backends_beyond_the_table_are_known_to_each_process_alone(master: Master) -> None:
    pool = master.pool()
    worker = in_process(master, 0)
    for each in (pool, worker):
        each.apply(PoolChanges(add=[Backend(f"b{n}", Origin("http", "127.0.0.1", 1)) for n in range(SLOTS + 1)]))
        add(each, "last")
    worker.lease(None)
    assert worker.get("last").active == 1  # type: ignore[union-attr]
    assert sum(backend.active for backend in pool.backends()) == 0


def test_a_pool_of_the_name_of_one_that_leaves_has_numbers_of_its_own(master: Master) -> None:
    before = master.pool("a"), in_process(master, 0, "a")
    before[1].lease(None)
    after = master.pool("a"), in_process(master, 1, "a")
    assert [each.backends()[0].active for each in (*before, *after)] == [1, 1, 0, 0]


# Records.


def collector(ledger: Ledger) -> tuple[Collector, Statistics]:
    statistics = Statistics()
    made = Collector(statistics, RouteCounts(), Canaries(lambda kind, text: None))
    made.add(ledger)
    return made, statistics


def test_totals_are_exact_although_workers_are_killed(master: Master) -> None:
    """A worker that is killed in the middle takes with it what it had in flight, one request at most here."""
    master.pool("a", "b")
    workers = master.start(3)
    for worker in workers:
        worker.tell("requests()")
    ended = 0
    for worker in workers:
        ended += sum(worker.told() == "'ended'" or 1 for _ in range(100))
        worker.process.kill()
        assert worker.process.stdout is not None
        ended += len(worker.process.stdout.read().split())
        worker.process.wait()
    lost = sum(master.collector.end(worker.ledger) for worker in workers)
    whole = master.statistics.snapshot()[0]
    assert 0 <= whole["total_requests"] - ended <= len(workers)  # one was recorded, but not yet told of
    assert 0 <= lost <= len(workers)
    assert whole["active_requests"] == 0


def test_a_record_arrives_as_it_was_made() -> None:
    ledger = Ledger()
    reports, (taking, statistics) = Reports(ledger), collector(ledger)
    pool = make_pool(None, NAMES)
    lease = pool.lease(None)
    record = make_record(None, 503, route="r", pool="p", error="\ud800 odd", excluded={"a": "full"}, complete=False)
    record.attempts = [make_attempt_of(lease.choice, "connect_failed"), make_attempt_of(lease.choice, "200")]
    record.websocket = WebSocketRecord("a", 1, 2, 3, 4, 5.0, 1000, "client")
    reports.begin()
    reports.record(record)
    taking.take()
    taken = statistics.find(record.request_id)
    assert taken is not None
    assert taken.explain() == record.explain()
    assert taken.describe() == record.describe()


def test_the_newest_of_all_come_as_they_ended() -> None:
    ledgers = [Ledger(), Ledger()]
    taking, statistics = collector(ledgers[0])
    taking.add(ledgers[1])
    for number in range(6):
        record = make_record(timestamp=100.0 + number, request_id=f"id-{number}")
        Reports(ledgers[number % 2]).record(record)
    taking.take()
    assert [record.request_id for record in statistics.newest(6)] == [f"id-{number}" for number in (5, 4, 3, 2, 1, 0)]


def test_a_strategy_that_cannot_explain_itself_costs_no_request() -> None:
    ledger = Ledger()
    reports, (taking, statistics) = Reports(ledger), collector(ledger)
    backend = Backend("a", Origin("http", "127.0.0.1", 1))
    odd = Choice(backend, Scene("odd", [backend], [None], lambda rank, now: 1 / 0, {}, {}))
    record = make_record(attempts=[make_attempt_of(odd, "200")])
    reports.record(record)
    taking.take()
    assert statistics.snapshot()[0]["total_requests"] == 1
    assert statistics.newest(1)[0].explain()["tried"][0]["candidates"] == []


def make_attempt_of(choice: Choice, outcome: str) -> Attempt:
    attempt = make_attempt("", outcome)
    attempt.choice = choice
    return attempt


def test_a_master_that_stands_still_costs_no_request_and_loses_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are told late then, and some not at all."""
    monkeypatch.setattr("balancer.observe.reports.QUEUED", 10)
    monkeypatch.setattr("balancer.observe.reports.SHOWN", 100)
    ledger = Ledger(ring=4096)
    reports, (taking, statistics) = Reports(ledger), collector(ledger)
    for _ in range(100):
        reports.begin()
        reports.record(make_record())
    taking.take()
    whole = statistics.snapshot()[0]
    assert (whole["total_requests"], whole["active_requests"]) == (100, 0)
    shown = len(statistics.newest(100))
    assert shown < 90
    assert ledger.counts[DROPPED] == 100 - shown - 10
    reports.flush()
    taking.take()
    assert len(statistics.newest(100)) == shown + 10


def test_what_there_is_no_cell_for_is_told_and_counted() -> None:
    ledger = Ledger(cells=1)
    reports, (taking, statistics) = Reports(ledger), collector(ledger)
    for number in range(200):
        reports.begin()
        reports.record(make_record(status=200 + number % 2, queued=0.5, bytes_out=10))
    taking.take()
    whole = statistics.snapshot()[0]
    assert (whole["total_requests"], whole["active_requests"]) == (200, 0)
    assert statistics.lifetime().totals.bytes_out == 2000


@given(st.lists(st.tuples(st.sampled_from(RECORDS), st.floats(0, 10), st.integers(0, 9)), max_size=30))
def test_counts_are_those_of_one_process(made: list[tuple[dict[str, Any], float, int]]) -> None:
    """Whatever was recorded, and however often the master looked meanwhile."""
    ledger, alone = Ledger(cells=20), Statistics(wall_clock=lambda: 0.0)
    reports, (taking, statistics) = Reports(ledger), collector(ledger)
    for fields, seconds, look in made:
        record = make_record(seconds=seconds, **fields)
        for each in (alone, reports):
            each.begin()
            each.record(record)
        if look == 0:
            taking.take()
    taking.take()
    theirs, ours = statistics.kept(), alone.kept()
    theirs["whole"].pop("start_time")
    ours["whole"].pop("start_time")
    assert flat(theirs) == flat(ours)
    ledger.close()


def flat(value: Any) -> Any:
    """Whatever the order, and rounded as sums are."""
    if isinstance(value, dict):
        return {key: flat(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted((flat(each) for each in value), key=repr)
    return round(value, 6) if isinstance(value, float) else value


def test_counts_of_other_things_arrive_and_open_websockets_end_with_their_worker() -> None:
    ledger = Ledger()
    reports, statistics, routes = Reports(ledger), Statistics(), RouteCounts()
    taking = Collector(statistics, routes, Canaries(lambda kind, text: None))
    taking.add(ledger)
    sockets = [WebSocketRecord("a"), WebSocketRecord("b")]
    for socket in sockets:
        reports.websockets.opened(socket)
    reports.retried()
    reports.refusals.count("partners", "missing")
    reports.routes.mirrored("r", "answered")
    reports.begin()
    sockets[0].messages_in = 3
    reports.flush()
    taking.take()
    assert statistics.websockets.open() == {"a": 1, "b": 1}
    assert statistics.websockets.totals().messages == {"in": 3, "out": 0}
    assert statistics.lifetime().retries == 1
    assert statistics.refusals.counts() == {("partners", "missing"): 1}
    assert routes.copies() == {("r", "answered"): 1}
    sockets[1].code = 1000
    reports.websockets.closed(sockets[1])
    assert statistics.snapshot()[0]["active_requests"] == 1
    assert taking.end(ledger) == 1
    assert statistics.websockets.open() == {}
    assert statistics.websockets.totals().closes == {("1000", "balancer"): 1, ("1006", "balancer"): 1}
    assert statistics.snapshot()[0]["active_requests"] == 0


def test_records_count_for_their_routes() -> None:
    ledger = Ledger()
    reports, statistics, routes = Reports(ledger), Statistics(), RouteCounts()
    taking = Collector(statistics, routes, Canaries(lambda kind, text: None))
    taking.add(ledger)
    reports.record(make_record(route="r"))
    reports.record(make_record())
    taking.take()
    assert {route: counted.total for route, counted in routes.lifetime().items()} == {"r": 1}


@given(st.lists(st.one_of(st.none(), st.binary(max_size=70)), max_size=60))
def test_a_ring_gives_what_was_put_in(steps: list[bytes | None]) -> None:
    """None reads; what finds no room is left out."""
    memory = memoryview(bytearray(64 + 128))
    ring, other = Ring(memory), Ring(memory)
    waiting: list[bytes] = []
    for message in steps:
        if message is None:
            assert other.read() == waiting
            waiting = []
        elif ring.write(message):
            waiting.append(message)
        else:
            assert sum(4 + len(each) for each in (*waiting, message)) > 128
    assert other.read() == waiting

"""The worker pool: last idle first used, growth on demand, a bounded queue, a reserve for control calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import wait_until

from balancer.edge import workers
from balancer.edge.workers import CONTROL_THREADS, WorkerPool

MAX_THREADS = 3
MAX_QUEUED = 2


class Call:
    """A call that may wait inside until it is let go."""

    def __init__(self, waits: bool = False, source: str = "") -> None:
        self.source = source
        self.started = threading.Event()
        self.done = threading.Event()
        self.thread: threading.Thread | None = None
        self._gate = threading.Event()
        if not waits:
            self._gate.set()

    def run(self) -> None:
        self.thread = threading.current_thread()
        self.started.set()
        self._gate.wait(60)
        self.done.set()

    def let_go(self) -> None:
        self._gate.set()


class Bench:
    """A pool and the calls given to it, so that all can be let go at the end."""

    def __init__(self, max_threads: int = MAX_THREADS, max_queued: int = MAX_QUEUED, idle_timeout: float = 30) -> None:
        self.pool = WorkerPool(max_threads, max_queued, idle_timeout)
        self.calls: list[Call] = []

    def submit(self, waits: bool = True, is_control: bool = False, source: str = "") -> Call | None:
        call = Call(waits, source)
        if not self.pool.submit(call, is_control):
            return None
        self.calls.append(call)
        return call

    def run(self, waits: bool = True, is_control: bool = False, source: str = "") -> Call:
        """Submit and wait until a thread works on it."""
        call = self.submit(waits, is_control, source)
        assert call is not None and call.started.wait(60)
        return call

    def fill(self) -> list[Call]:
        """All threads busy."""
        return [self.run() for _ in range(MAX_THREADS)]

    def wait_idle(self, count: int) -> None:
        wait_until(lambda: len(self.pool._idle) == count, what=f"{count} idle threads")

    def close(self) -> None:
        for call in self.calls:
            call.let_go()
        self.pool.stop(10)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_call_runs_on_a_named_daemon_thread(bench: Bench) -> None:
    call = bench.run(waits=False)
    assert call.thread is not None
    assert call.thread.name.startswith("worker-") and call.thread.daemon


def test_threads_grow_on_demand_up_to_the_limit(bench: Bench) -> None:
    calls = bench.fill()
    assert len({call.thread for call in calls}) == MAX_THREADS
    waiting = bench.submit()
    assert waiting is not None and not waiting.started.is_set()
    assert bench.pool.queued == 1


def test_an_idle_thread_is_used_before_a_new_one(bench: Bench) -> None:
    first = bench.run(waits=False)
    for _ in range(20):
        bench.wait_idle(1)
        assert bench.run(waits=False).thread is first.thread


def test_the_thread_that_went_idle_last_works_next(bench: Bench) -> None:
    calls = bench.fill()
    for idle, call in enumerate(calls, start=1):
        call.let_go()
        bench.wait_idle(idle)
    assert [bench.run().thread for _ in calls] == [call.thread for call in reversed(calls)]


def test_the_queue_is_first_come_first_served_and_bounded(bench: Bench) -> None:
    busy = bench.fill()
    queued = [bench.submit() for _ in range(MAX_QUEUED)]
    assert bench.submit() is None
    assert bench.pool.queued == MAX_QUEUED
    for free, call in zip(busy, queued, strict=False):
        free.let_go()
        assert call is not None and call.started.wait(60)
        assert call.thread is free.thread
    assert bench.pool.queued == 0


def test_a_queue_of_none_refuses_at_once() -> None:
    bench = Bench(max_threads=1, max_queued=0)
    bench.run()
    assert bench.submit() is None
    bench.close()


def test_a_withdrawn_call_never_runs(bench: Bench) -> None:
    busy = bench.fill()
    withdrawn, other = bench.submit(), bench.submit(waits=False)
    assert withdrawn is not None and other is not None
    assert bench.pool.withdraw(withdrawn) is True
    assert bench.pool.withdraw(withdrawn) is False
    busy[0].let_go()
    assert other.done.wait(60)
    assert not withdrawn.started.is_set()


def test_a_call_that_runs_cannot_be_withdrawn(bench: Bench) -> None:
    assert bench.pool.withdraw(bench.run()) is False


def test_control_calls_have_threads_of_their_own_when_all_are_busy(bench: Bench) -> None:
    bench.fill()
    control = [bench.run(is_control=True) for _ in range(CONTROL_THREADS)]
    assert len({call.thread for call in control}) == CONTROL_THREADS
    last = bench.submit(is_control=True)
    assert last is not None and not last.started.is_set()


def test_the_control_reserve_is_not_eaten_by_queued_requests() -> None:
    """A full balancer that is watched: /status must answer as often as it is asked."""
    bench = Bench(max_threads=1, max_queued=100)
    bench.run()
    for _ in range(3 * CONTROL_THREADS):
        bench.submit()
    for number in range(2 * CONTROL_THREADS):
        control = bench.submit(waits=False, is_control=True)
        assert control is not None and control.done.wait(60), f"control call {number + 1} found no thread"
    assert bench.pool.queued == 3 * CONTROL_THREADS
    bench.close()


def test_a_control_call_that_waits_has_the_reserve_again(bench: Bench) -> None:
    """It waited until one of the requests had ended, some of which never do."""
    bench.fill()
    control = [bench.run(is_control=True) for _ in range(CONTROL_THREADS)]
    last = bench.submit(is_control=True)
    control[0].let_go()
    assert last is not None and last.started.wait(60)


def test_threads_beyond_the_limit_end_after_their_call(bench: Bench) -> None:
    bench.fill()
    control = bench.run(waits=False, is_control=True)
    assert control.thread is not None
    control.thread.join(60)
    assert not control.thread.is_alive()


def test_idle_threads_end_and_new_ones_come_when_needed() -> None:
    bench = Bench(idle_timeout=0.02)
    calls = bench.fill()
    for call in calls:
        call.let_go()
    for call in calls:
        assert call.thread is not None
        call.thread.join(60)
        assert not call.thread.is_alive()
    again = bench.fill()
    assert not {call.thread for call in again} & {call.thread for call in calls}
    bench.close()


@pytest.mark.usefixtures("restless")
def test_nothing_is_lost_when_threads_end_while_calls_come() -> None:
    bench = Bench(max_threads=4, max_queued=10_000, idle_timeout=0.0001)
    try:
        senders = [threading.Thread(target=lambda: [bench.submit(waits=False) for _ in range(500)]) for _ in range(4)]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(60)
        assert len(bench.calls) == 2000
        assert all(call.done.wait(60) for call in bench.calls)
    finally:
        bench.close()


def test_stop_joins_idle_and_busy_threads_and_takes_no_more(bench: Bench) -> None:
    busy, quick = bench.run(), bench.run(waits=False)
    bench.wait_idle(1)
    stopper = threading.Thread(target=bench.pool.stop, args=(20,))
    stopper.start()
    assert quick.thread is not None and busy.thread is not None
    quick.thread.join(60)
    assert not quick.thread.is_alive() and stopper.is_alive()
    assert bench.submit() is None
    busy.let_go()
    stopper.join(60)
    assert not stopper.is_alive() and not busy.thread.is_alive()


def test_stop_gives_up_on_a_call_that_never_ends(bench: Bench) -> None:
    busy = bench.run()
    bench.pool.stop(0.01)
    assert busy.thread is not None and busy.thread.is_alive()


def test_a_queued_call_still_runs_during_stop(bench: Bench) -> None:
    busy = bench.fill()
    queued = bench.submit(waits=False)
    bench.pool.stop(0.01)
    busy[0].let_go()
    assert queued is not None and queued.done.wait(60)


def test_a_thread_that_cannot_start_takes_no_seat(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit of processes: what cannot run now is refused, and the pool is whole afterwards."""

    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    def submit_quietly() -> Any:
        try:
            return bench.submit()
        except RuntimeError:
            return None

    monkeypatch.setattr(workers, "Thread", Refused)
    assert [submit_quietly() for _ in range(MAX_THREADS)] == [None] * MAX_THREADS
    monkeypatch.undo()
    assert len({call.thread for call in bench.fill()}) == MAX_THREADS


# Shares: one client address leaves room for others.

SHARED = 8  # threads, of which one source may have six


@pytest.fixture
def shared() -> Iterator[Bench]:
    made = Bench(max_threads=SHARED, max_queued=8)
    yield made
    made.close()


def test_one_source_leaves_threads_for_others(shared: Bench) -> None:
    held = [shared.run(source="greedy") for _ in range(6)]
    waiting = shared.submit(waits=False, source="greedy")
    assert waiting is not None and shared.pool.queued == 1
    assert shared.run(waits=False, source="other").done.wait(60)
    shared.wait_idle(1)
    assert not waiting.started.is_set(), "though a thread is idle"
    held[0].let_go()
    assert waiting.done.wait(60)
    assert waiting.thread is held[0].thread


def test_one_source_leaves_room_in_the_queue(shared: Bench) -> None:
    for _ in range(6):
        shared.run(source="greedy")
    assert all(shared.submit(source="greedy") for _ in range(6))
    assert shared.submit(source="greedy") is None
    assert shared.pool.submit(Call(source="greedy"), False, is_under_way=True), "it was let in already"
    assert shared.run(source="other") and shared.run(source="other")
    assert shared.submit(source="other") is not None


def test_without_a_source_there_is_no_share(shared: Bench) -> None:
    """A proxy in front of us that is trusted: many clients are behind it."""
    assert len({shared.run().thread for _ in range(SHARED)}) == SHARED


def test_sources_that_wait_take_turns(shared: Bench) -> None:
    held = [shared.run() for _ in range(SHARED)]
    greedy = [shared.submit(source="greedy") for _ in range(4)]
    modest = [shared.submit(source=name) for name in ("a", "b")]
    for call in (greedy[0], *modest, *greedy[1:]):
        assert call is not None and not call.started.is_set()
        held.pop().let_go()
        assert call.started.wait(60)


def test_the_control_reserve_is_beyond_the_share(shared: Bench) -> None:
    for _ in range(6):
        shared.run(source="greedy")
    for _ in range(CONTROL_THREADS):
        shared.run(is_control=True, source="greedy")
    last = shared.submit(is_control=True, source="greedy")
    assert last is not None and not last.started.is_set()


def test_control_calls_of_one_source_are_few_at_a_time() -> None:
    """Each is work for the interpreter: hundreds at once would keep everybody else from it."""
    bench = Bench(max_threads=100, max_queued=100)
    held = [bench.run(is_control=True, source=source) for source in ("a", "b") for _ in range(CONTROL_THREADS)]
    waiting = bench.submit(is_control=True, source="a")
    assert waiting is not None and not waiting.started.is_set()
    assert bench.run(source="a", waits=False).done.wait(60), "though it may have threads for other calls"
    held[0].let_go()
    assert waiting.started.wait(60)
    assert bench.submit(is_control=True, source="b") is not None
    bench.close()


def test_a_control_call_is_withdrawn_too(shared: Bench) -> None:
    for _ in range(CONTROL_THREADS):
        shared.run(is_control=True, source="a")
    waiting = shared.submit(is_control=True, source="a")
    assert waiting is not None and shared.pool.withdraw(waiting) and shared.pool.queued == 0


def test_a_call_is_withdrawn_from_its_source_s_queue(shared: Bench) -> None:
    held = [shared.run(source="greedy") for _ in range(6)]
    first, second = shared.submit(source="greedy"), shared.submit(source="greedy")
    assert first is not None and second is not None
    assert shared.pool.withdraw(first) and not shared.pool.withdraw(first)
    held[0].let_go()
    assert second.started.wait(60) and not first.started.is_set()
    assert shared.pool.queued == 0

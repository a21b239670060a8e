"""A pool of worker threads that grows on demand: the thread that went idle last works next.

Few threads are ever awake that way, and those that have not been needed for a while end. When all are busy, calls wait
in a bounded queue: each client address has its turn, and its own calls are served first come first served. None can
hold all threads, nor fill the queue.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from threading import Lock, Thread
from typing import Protocol

log = logging.getLogger("balancer.workers")

CONTROL_THREADS = 8  # beyond max_threads, so that /status answers when everything else is busy
Share = tuple[str, bool]  # a source, and whether it is for its control calls


class Runnable(Protocol):
    """What a worker runs. `run` never raises. `source` is whoever it is for; "" may have all threads."""

    @property
    def source(self) -> str: ...

    def run(self) -> None: ...


class WorkerPool:
    """Threads that run calls: the one that went idle last is used first, so that few are ever awake.

    A source has three quarters of the threads, and of the room in the queue, at most; and beside these CONTROL_THREADS
    for control calls, which keep the interpreter busy and not only a thread.

    `_lock` guards `_idle`, `_busy`, `_queues`, `_queued`, `_serial`, `_threads` and `_stopping`. A worker sleeps on its
    own lock, which whoever gives it a call releases.
    """

    def __init__(self, max_threads: int, max_queued: int, idle_timeout: float) -> None:
        self._max_threads = max_threads
        self._max_queued = max_queued
        self._share = max_threads - max_threads // 4
        self._queue_share = max_queued - max_queued // 4
        self._idle_timeout = idle_timeout
        self._lock = Lock()
        self._idle: list[_Worker] = []
        self._busy: dict[Share, int] = {}  # threads in use, where there are any
        self._queues: dict[Share, deque[Runnable]] = {}  # none is empty; the first one's turn is next
        self._queued = 0  # in all of them
        self._threads: dict[int, Thread] = {}
        self._serial = 0
        self._stopping = False

    @property
    def queued(self) -> int:
        return self._queued

    def submit(self, call: Runnable, is_control: bool, *, is_under_way: bool = False) -> bool:
        """Hand over to an idle thread, a new one, or the queue. False if all are full.

        The queue has room for whatever `is_under_way`: it was let in already, and may have had its effect.
        """
        share = call.source, is_control
        with self._lock:
            if self._stopping:
                return False
            may_run = self._may_run(share)
            if may_run and self._idle:
                worker = self._idle.pop()
                self._give(worker, call, share)
                worker.wake.release()
                return True
            if not may_run or len(self._threads) >= self._max_threads + (CONTROL_THREADS if is_control else 0):
                return self._enqueue(call, share, is_under_way)
            self._serial += 1
            worker = _Worker()
            self._give(worker, call, share)
            # A request that never ends must not keep a stopped process alive. If that were set later, Python would ask
            # the thread that runs this, and keep an entry for Granian's for ever.
            thread = Thread(target=self._work, args=(worker, self._serial), name=f"worker-{self._serial}", daemon=True)
            serial, self._threads[self._serial] = self._serial, thread
        try:
            thread.start()
        except RuntimeError:  # the machine gives no more threads
            with self._lock:
                del self._threads[serial]
                self._leave(worker)
            return False
        return True

    def withdraw(self, call: Runnable) -> bool:
        """Take a call out of the queue again. False if it has left it already."""
        source = call.source
        with self._lock:
            for share in ((source, False), (source, True)):
                calls = self._queues.get(share)
                if calls is not None and call in calls:
                    calls.remove(call)
                    self._queued -= 1
                    if not calls:
                        del self._queues[share]
                    return True
        return False

    def stop(self, timeout: float) -> None:
        """Let idle threads end and wait for the busy ones, `timeout` seconds in all."""
        with self._lock:
            self._stopping = True
            idle, self._idle = self._idle, []
            threads = list(self._threads.values())
        for worker in idle:
            worker.wake.release()
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self, worker: _Worker, serial: int) -> None:
        while worker.call is not None:
            try:
                worker.call.run()
            except BaseException:  # the seat must not be lost with the thread
                log.exception("request failed")
            self._next(worker, serial)

    def _next(self, worker: _Worker, serial: int) -> None:
        """Give `worker` its next call, at once or after sleeping; None ends the thread."""
        with self._lock:
            self._leave(worker)
            is_reserve = len(self._threads) > self._max_threads
            if found := self._take_queued(is_reserve):
                self._give(worker, *found)
                return
            if is_reserve or self._stopping:
                del self._threads[serial]
                return
            self._idle.append(worker)
        if worker.wake.acquire(timeout=self._idle_timeout):
            return
        with self._lock:
            if worker in self._idle:
                self._idle.remove(worker)
                del self._threads[serial]
                return
        worker.wake.acquire()  # a call came at the same moment

    # The lock must be held.

    def _may_run(self, share: Share) -> bool:
        source, is_control = share
        if is_control:
            return self._busy.get(share, 0) < CONTROL_THREADS
        return not source or self._busy.get(share, 0) < self._share

    def _give(self, worker: _Worker, call: Runnable, share: Share) -> None:
        worker.call, worker.share = call, share
        self._busy[share] = self._busy.get(share, 0) + 1

    def _leave(self, worker: _Worker) -> None:
        """Its call is over."""
        worker.call, share = None, worker.share
        self._busy[share] -= 1
        if not self._busy[share]:
            del self._busy[share]

    def _enqueue(self, call: Runnable, share: Share, is_under_way: bool) -> bool:
        calls = self._queues.get(share)
        is_full = self._queued >= self._max_queued or (share[0] and calls and len(calls) >= self._queue_share)
        if is_full and not is_under_way:
            return False
        if calls is None:
            calls = self._queues[share] = deque()
        calls.append(call)
        self._queued += 1
        return True

    def _take_queued(self, is_reserve: bool) -> tuple[Runnable, Share] | None:
        """The next call whose turn it is and that may run, in the reserve a control call. Few can be at their limit, so
        this ends soon."""
        for share, calls in self._queues.items():
            if (share[1] or not is_reserve) and self._may_run(share):
                call = calls.popleft()
                self._queued -= 1
                del self._queues[share]
                if calls:
                    self._queues[share] = calls  # behind the others
                return call, share
        return None


class _Worker:
    """A worker thread's seat: its next call, whose share that is of, and the lock it sleeps on."""

    __slots__ = ("call", "share", "wake")

    def __init__(self) -> None:
        self.call: Runnable | None = None
        self.share: Share = "", False
        self.wake = Lock()
        self.wake.acquire()

"""A pool of worker threads that grows on demand: the thread that went idle last works next.

Few threads are ever awake that way, and those that have not been needed for a while end. When all are busy, calls wait
in a bounded queue, first come first served.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from threading import Lock, Thread
from typing import Protocol

log = logging.getLogger("balancer.workers")

CONTROL_THREADS = 8  # beyond max_threads, so that /status answers when everything else is busy


class Runnable(Protocol):
    """What a worker runs. `run` never raises."""

    def run(self) -> None: ...


class WorkerPool:
    """Threads that run calls: the one that went idle last is used first, so that few are ever awake.

    `_lock` guards `_idle`, `_queue`, `_serial`, `_threads` and `_stopping`. A worker sleeps on its own lock, which
    `submit` releases.
    """

    def __init__(self, max_threads: int, max_queued: int, idle_timeout: float) -> None:
        self._max_threads = max_threads
        self._max_queued = max_queued
        self._idle_timeout = idle_timeout
        self._lock = Lock()
        self._idle: list[_Worker] = []
        self._queue: deque[Runnable] = deque()
        self._threads: dict[int, Thread] = {}
        self._serial = 0
        self._stopping = False

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, call: Runnable, is_control: bool, *, is_under_way: bool = False) -> bool:
        """Hand over to an idle thread, a new one, or the queue. False if all are full.

        The queue has room for whatever `is_under_way`: it was let in already, and may have had its effect.
        """
        with self._lock:
            if self._stopping:
                return False
            if self._idle:
                worker = self._idle.pop()
                worker.call = call
                worker.wake.release()
                return True
            if len(self._threads) < self._max_threads + (CONTROL_THREADS if is_control else 0):
                self._serial += 1
                worker = _Worker(call)
                thread = Thread(target=self._work, args=(worker, self._serial), name=f"worker-{self._serial}")
                thread.daemon = True  # a request that never ends must not keep a stopped process alive
                serial, self._threads[self._serial] = self._serial, thread
            elif is_under_way or len(self._queue) < self._max_queued:
                self._queue.append(call)
                return True
            else:
                return False
        try:
            thread.start()
        except RuntimeError:  # the machine gives no more threads
            with self._lock:
                del self._threads[serial]
            return False
        return True

    def withdraw(self, call: Runnable) -> bool:
        """Take a call out of the queue again. False if it has left it already."""
        with self._lock:
            try:
                self._queue.remove(call)
            except ValueError:
                return False
        return True

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
        worker.call = None
        with self._lock:
            if len(self._threads) > self._max_threads:  # the reserve is for control calls, not for the queue
                del self._threads[serial]
                return
            if self._queue:
                worker.call = self._queue.popleft()
                return
            if self._stopping:
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


class _Worker:
    """A worker thread's seat: its next call and the lock it sleeps on."""

    __slots__ = ("call", "wake")

    def __init__(self, call: Runnable) -> None:
        self.call: Runnable | None = call
        self.wake = Lock()
        self.wake.acquire()

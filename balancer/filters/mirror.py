"""A copy of some requests goes to another pool as well: nobody waits for its answer, and clients cannot tell.

What would make a client wait is left out instead: copies beyond `max_in_flight`, a body that is large or still coming,
a pool that is full. A copy blames no backend, for its pool may have clients of its own.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from balancer.balancing.pool import BackendPool
from balancer.errors import BackendError, OutOfDescriptors
from balancer.forwarding.filter import Filter
from balancer.observe.routecounts import Mirrored, RouteCounts
from balancer.protocol.client import Caller
from balancer.protocol.request import Request
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.transport import BackendAdapter

log = logging.getLogger("balancer.mirror")

MAX_THREADS = 64  # of all mirrors together, on demand
MAX_ANSWER = 1_048_576  # bytes of an answer that are read, so that the backend can write all of it


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """By the names in a route's `mirror`."""

    share: float
    methods: tuple[str, ...]
    max_body: int
    max_in_flight: int
    timeout: float


class Copies:
    """All that are on their way, and the threads that bring them. `_lock` guards `_under_way`, per route, and
    `_is_stopping`."""

    def __init__(self, counts: RouteCounts) -> None:
        self.counts = counts
        self._lock = Lock()
        self._under_way: dict[str, set[Caller]] = {}
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="mirror")
        self._is_stopping = False

    def add(self, route: str, most: int, bring: Callable[[Caller], Mirrored]) -> None:
        """Let a thread `bring` one, unless there are so many already. Never waits."""
        copy = Caller()
        with self._lock:
            under_way = self._under_way.setdefault(route, set())
            if self._is_stopping:
                return
            if is_room := len(under_way) < most:
                under_way.add(copy)
                with suppress(RuntimeError):  # the machine gives no more threads: it waits for one that is there
                    self._threads.submit(self._run, route, copy, bring)
        if not is_room:
            self.counts.mirrored(route, "full")

    def stop(self) -> None:
        """Cut off what is on its way, and join."""
        with self._lock:
            self._is_stopping = True
            copies = [copy for under_way in self._under_way.values() for copy in under_way]
        for copy in copies:
            copy.disconnect()
        self._threads.shutdown()

    def _run(self, route: str, copy: Caller, bring: Callable[[Caller], Mirrored]) -> None:
        outcome: Mirrored = "failed"
        try:
            if not copy.is_gone:
                outcome = bring(copy)
        except Exception:  # no client may see it, but the operator should
            log.exception("a copy of a request to route %s failed", route)
        finally:
            with self._lock:
                self._under_way[route].discard(copy)
            self.counts.mirrored(route, outcome)


class Mirror(Filter):
    """`mirror` of one route: `share` of its requests are copied, with their body if that is here and small."""

    def __init__(
        self,
        route: str,
        options: MirrorOptions,
        pool: BackendPool,
        adapter: BackendAdapter,
        copies: Copies,
    ) -> None:
        self._route, self._options, self._pool, self._adapter = route, options, pool, adapter
        self._copies = copies

    def send(self, request: Request, outgoing: OutgoingRequest) -> None:
        options = self._options
        if request.method not in options.methods or random.random() >= options.share:
            return
        body = outgoing.body or b""
        if not outgoing.is_replayable or len(body) > options.max_body:
            self._copies.counts.mirrored(self._route, "too_large")
            return
        own = [line for line in outgoing.own if line[0] != b"x-request-id"]
        own += [(b"x-request-id", request.id + b"-mirror"), (b"x-mirrored", b"1")]
        copied = OutgoingRequest(str(outgoing.method), outgoing.target, own, outgoing.shared)
        if outgoing.body is not None:
            copied.set_body(body)
        self._copies.add(self._route, options.max_in_flight, lambda copy: self._bring(request, copied, copy))

    def _bring(self, request: Request, copied: OutgoingRequest, copy: Caller) -> Mirrored:
        lease = self._pool.lease_now(request)
        if lease is None:
            return "no_backend"
        copied.client, copied.deadline = copy, time.monotonic() + self._options.timeout
        try:
            response = self._adapter.exchange(copied, lease.choice.origin)
            if isinstance(response.body, ResponseBody):
                response.body.read_out(MAX_ANSWER, copied.deadline)
            return "answered"
        except (BackendError, OutOfDescriptors):
            return "failed"
        finally:
            lease.release()

"""How many requests a key may send, and have in flight: all limits of a route must say yes, and only then each counts.

What a request asks for is decided in one step for all limits, so that one that is refused is charged by none.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

from typing_extensions import TypedDict

from balancer.errors import LimitReached
from balancer.filters.debts import KEYS_KEPT
from balancer.filters.limit import SECOND, Key, Limit, LimitOptions, Mode, News, key_named, key_of
from balancer.filters.sharedlimit import Charge, Settled, SharedLimit
from balancer.forwarding.filter import Filter
from balancer.observe.events import Events
from balancer.observe.plain import fill
from balancer.observe.record import Record
from balancer.protocol.addresses import Network
from balancer.protocol.messages import Line
from balancer.protocol.request import Request

NONE: Sequence[Limit] = ()


class LimitView(TypedDict):
    """`keys` are those that are known just now; `evicted` gave way to others since the start, for want of room."""

    name: str
    rate: str | None
    burst: int | None
    key: str
    in_flight: int | None
    mode: Mode
    on_store_failure: str
    keys: int
    evicted: int
    requests_in_flight: int
    requests: dict[str, int]


class KeyView(TypedDict):
    """`remaining` may be sent at once; `retry_after` seconds until one may, `reset` until all may again."""

    name: str
    key: str
    remaining: int
    retry_after: float
    reset: float
    in_flight: int


class Limiter:
    """All limits in force. `_limits`, by name, is replaced and never changed.

    `lock` guards every Limit. One is enough: what is done under it takes a microsecond, with Python's own lock held.
    `salt` makes the keys of values that may be secret; if it is given, others have it too, and all hold the limits
    together.
    """

    def __init__(self, events: Events, clock: Callable[[], int] = time.monotonic_ns, salt: bytes | None = None) -> None:
        self.lock = Lock()
        self.clock = clock
        self.salt = salt or secrets.token_bytes(16)
        self._events = events
        self._limits: Mapping[str, Limit] = {}
        self._kind: type[Limit] = Limit if salt is None else SharedLimit
        self._shared_by = (1, False)  # so many; whether the ledger is lost

    def use(self, wanted: Iterable[LimitOptions]) -> None:
        """From now on these. One that is defined as before keeps what its keys owe and hold, any other its counts."""
        self._limits = {each.name: self._kind.after(self._limits.get(each.name), each) for each in wanted}
        self.share(*self._shared_by)

    def filter(self, names: Iterable[str], route: str = "", trusted: Sequence[Network] = ()) -> Limits:
        """For one route, with those of these names."""
        limits = [self._limits[name] for name in dict.fromkeys(names)]
        kind = Holding if any(limit.in_flight for limit in limits) else Limits
        return kind(self, [(limit, key_of(limit.options.key, route, trusted, self.salt)) for limit in limits])

    def tell(self, kind: News, limits: Iterable[Limit], now: int) -> None:
        """What has happened to them, as events, unless that was told a moment ago."""
        with self.lock:
            fresh = [limit for limit in limits if limit.is_news(kind, now)]
        for limit in fresh:
            if kind == "limit_reached":
                what = "are" if limit.is_enforced else "would be"
                self._events.add("limit_reached", None, f"{limit} is reached: requests {what} refused", "warning")
            else:
                text = f"{limit} has no room for more than {KEYS_KEPT} keys: new ones owe what others have owed"
                self._events.add("limit_keys_full", None, text, "warning")

    # Among several.

    def share(self, members: int, is_lost: bool = False) -> None:
        """So many hold all limits together; the last that were known of, if the ledger is lost."""
        self._shared_by = members, is_lost
        with self.lock:
            for limit in self._shared():
                limit.share(members, is_lost)

    def charges(self) -> list[Charge]:
        """What is to be said to the ledger now."""
        with self.lock:
            return [each for limit in self._shared() for each in limit.charges()]

    def settle(self, charges: Sequence[Charge], settled: Sequence[Settled]) -> None:
        """What the ledger says to these."""
        with self.lock:
            now = self.clock()
            for charge, each in zip(charges, settled, strict=True):
                limit = self._limits.get(charge.limit)
                if isinstance(limit, SharedLimit):
                    limit.settle(charge, each, now)

    def _shared(self) -> list[SharedLimit]:
        return [limit for limit in self._limits.values() if isinstance(limit, SharedLimit)]

    # Over restarts.

    def counts(self) -> dict[str, int]:
        """Requests by the name of the limit, a blank, and what became of them."""
        with self.lock:
            return {f"{name} {what}": n for name, limit in self._limits.items() for what, n in limit.counts.items()}

    def restore(self, kept: Any) -> None:
        """Go on from what `plain` made of `counts`."""
        with self.lock:
            for name, limit in self._limits.items():
                for what in limit.counts:
                    limit.counts[what] += fill({}, kept).get(f"{name} {what}", 0)

    # For the control API.

    def describe(self) -> list[LimitView]:
        with self.lock:
            return [_view(limit) for limit in self._limits.values()]

    def find(self, name: str) -> Limit | None:
        return self._limits.get(name)

    def look(self, limit: Limit, value: str) -> KeyView:
        """How it stands with a key, without spending anything."""
        key, now = key_named(limit.options.key, value, self.salt), self.clock()
        with self.lock:
            left, _, owed = limit.left(key, now)
            return {
                "name": limit.options.name,
                "key": value,
                "remaining": left,
                "retry_after": max(limit.wait(key, now), 0) / SECOND,
                "reset": owed / SECOND,
                "in_flight": limit.held.get(key, 0),
            }


class Limits(Filter):
    """Those of one route, each with what it goes by."""

    is_safe = True

    def __init__(self, limiter: Limiter, limits: Sequence[tuple[Limit, Key]]) -> None:
        self._limiter = limiter
        self._lock = limiter.lock
        self._clock = limiter.clock
        self._limits = limits
        self._policy = (b"ratelimit-policy", b", ".join([limit.policy for limit, _ in limits if limit.is_enforced]))

    def admit(self, request: Request) -> None:
        """All of them let it through, or none. Sets `request.limited`: what was asked of them, which are reached, and
        the time to wait if that is why it is refused."""
        asked, full = [], []
        for limit, key in self._limits:
            asked.append((limit, key(request)))
        with self._lock:
            now = self._clock()
            for limit, named in asked:
                if limit.wait(named, now) > 0:
                    request.limited = _, reached, wait = asked, *_reach(asked, now)
                    break
            else:
                request.limited = asked, NONE, 0
                for limit, named in asked:
                    if limit.take(named, now):
                        full.append(limit)
                if not full:
                    return
        if full:
            self._limiter.tell("limit_keys_full", full, now)
            return
        self._limiter.tell("limit_reached", reached, now)
        if wait:
            names = [limit.options.name for limit in reached if limit.is_enforced]
            raise LimitReached(names, -(-wait // SECOND))

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        """With the fields of draft-ietf-httpapi-ratelimit-headers-10, as further items of what a backend says there."""
        if request.limited is None:  # it was refused before it came here
            return lines
        asked, reached, _ = request.limited
        if reached:
            record.limit = reached[0].options.name
        if not self._policy[1]:
            return lines
        now, told = self._clock(), b""
        for limit, key in asked:
            if limit.is_enforced:
                told = b"%s, %s" % (told, limit.told(key, now)) if told else limit.told(key, now)
        return [*lines, self._policy, (b"ratelimit", told)]


class Holding(Limits):
    """Some of which count requests in flight."""

    def done(self, request: Request, record: Record) -> None:
        if request.limited is None:
            return
        asked, reached, wait = request.limited
        request.limited = None
        if not wait:
            with self._lock:
                for limit, key in asked:
                    if limit.in_flight is not None and limit not in reached:
                        limit.give_back(key)


def _reach(asked: Sequence[tuple[Limit, str]], now: int) -> tuple[list[Limit], int]:
    """Some have to say no: (which, those first that are enforced; the time to wait, 0 if none is)."""
    waits = {limit: limit.wait(key, now) for limit, key in asked}
    reached = sorted([limit for limit in waits if waits[limit] > 0], key=lambda limit: not limit.is_enforced)
    wait = max([waits[limit] for limit in reached if limit.is_enforced], default=0)
    for limit, key in asked:
        if limit in reached:
            limit.counts["refused" if limit.is_enforced else "shadow"] += 1
        elif not wait:
            limit.take(key, now)
    return reached, wait


def _view(limit: Limit) -> LimitView:
    options = limit.options
    return {
        "name": options.name,
        "rate": options.rate,
        "burst": limit.burst or None,
        "key": options.key,
        "in_flight": options.in_flight,
        "mode": options.mode,
        "on_store_failure": options.on_store_failure,
        "keys": len(limit.debts) if options.rate else len(limit.held),
        "evicted": limit.debts.evicted,
        "requests_in_flight": sum(limit.held.values()),
        "requests": {**limit.counts},
    }

"""One limit: how many requests a key may send, by the generic cell rate algorithm, and how many it may have in flight.

That algorithm keeps one number for each key, and is exact: a request costs an interval, time pays that off, and no key
may owe more than a burst of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from balancer.filters.debts import Debts
from balancer.protocol.addresses import Network, network_of, plain
from balancer.protocol.request import Request
from balancer.protocol.requestkey import network_of_client, request_key

Key = Callable[["Request"], str]
Mode = Literal["enforce", "shadow"]
News = Literal["limit_reached", "limit_keys_full"]

SECOND = 1_000_000_000  # all times are in nanoseconds
BUSY = SECOND  # to wait where nobody knows when a request in flight will end
QUIET = 60 * SECOND  # between two events of one kind
PERIODS = {"s": 1, "m": 60, "h": 3600}  # of a rate, in seconds


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """By the names of its settings."""

    name: str
    rate: str | None = None
    burst: int | None = None
    key: str = "client_ip"
    in_flight: int | None = None
    mode: Mode = "enforce"
    on_store_failure: str = "local"


class Limit:
    """Not locked; the lock of its Limiter guards it. `held` are requests in flight by key, of those that have any."""

    def __init__(self, options: LimitOptions) -> None:
        self.options = options
        self.is_enforced = options.mode == "enforce"
        self.debts = Debts()
        self.held: dict[str, int] = {}
        self.counts = {"allowed": 0, "refused": 0, "shadow": 0}
        self._quiet_until: dict[News, int] = {}
        self.in_flight = options.in_flight
        self.item = b'"%s"' % options.name.encode()
        self.burst, self._interval, self.policy = options.burst or 0, 0, b""
        if options.rate is not None:
            count, _, unit = options.rate.partition("/")
            self.burst = options.burst or int(count)
            self._interval = PERIODS[unit] * SECOND // int(count)
            self.policy = b"%s;q=%s;w=%d" % (self.item, count.encode(), PERIODS[unit])
        else:
            self.policy = b'%s;q=%d;qu="concurrent-requests"' % (self.item, options.in_flight or 0)
        self._price = self._interval  # of a request
        self._slack = self._interval * (self.burst - 1)  # what may be owed when one more request comes

    @classmethod
    def after(cls, before: Limit | None, options: LimitOptions) -> Limit:
        """The one that was in force `before`, if it is defined as it was. Else a new one: nobody owes it anything, but
        its counts go on, and what is in flight counts if that goes by the same."""
        if before is not None and before.options == options:
            return before
        made = cls(options)
        if before is not None:
            made.counts = before.counts
            made.held = before.held if before.options.key == options.key else {}
        return made

    def wait(self, key: str, now: int) -> int:
        """What a request has to wait; 0 or less if it may be let through now."""
        wait = 0
        if self._interval:
            clear = self.debts.get(key)
            wait = (self.debts.of_another(now) if clear is None else clear) - now - self._slack
        if self.in_flight is not None and self.held.get(key, 0) >= self.in_flight:
            return max(wait, BUSY)
        return wait

    def take(self, key: str, now: int) -> bool:
        """Let a request through that does not have to wait. True if another key gave way to this one."""
        is_full = False
        self.counts["allowed"] += 1
        if self._interval:
            clear = self.debts.get(key)
            if clear is None:
                is_full = self.debts.add(key, self.debts.of_another(now) + self._price)
            else:
                self.debts[key] = (clear if clear > now else now) + self._price
        if self.in_flight is not None:
            self.held[key] = self.held.get(key, 0) + 1
        return is_full

    def give_back(self, key: str) -> None:
        """It is no longer in flight."""
        if self.held[key] > 1:
            self.held[key] -= 1
        else:
            del self.held[key]

    def left(self, key: str, now: int) -> tuple[int, int, int]:
        """(requests that it may send now, time until there is one more, time until it owes nothing); needs no lock."""
        if not self._interval:
            return (self.in_flight or 0) - self.held.get(key, 0), 0, 0
        clear = self.debts.get(key)
        owed = (self.debts.floor if clear is None else clear) - now
        if owed <= 0:
            return self.burst, 0, 0
        left, over = divmod(self._interval * self.burst - owed, self._interval)
        return (left if left > 0 else 0), self._interval - over, owed

    def told(self, key: str, now: int) -> bytes:
        """As an item of the field RateLimit: what is left, and in how many seconds there is more."""
        left, more, _ = self.left(key, now)
        return b"%s;r=%d;t=%d" % (self.item, left, -(-more // SECOND)) if more else b"%s;r=%d" % (self.item, left)

    def is_news(self, kind: News, now: int) -> bool:
        """Whether this is to be told: each kind at most once in a while, however often it happens."""
        if now < self._quiet_until.get(kind, 0):
            return False
        self._quiet_until[kind] = now + QUIET
        return True

    def __str__(self) -> str:
        options = self.options
        most = [options.rate or "", f"{options.in_flight} in flight" if options.in_flight else ""]
        return f"limit {options.name} ({', '.join(filter(None, most))})"


def key_of(text: str, route: str, trusted: Sequence[Network], salt: bytes) -> Key:
    """`client_ip`, `subject`, `header:NAME`, `route` or `global`. A request without a subject or that header counts by
    its client: leaving it out must neither free anybody nor put all into one."""
    if text in ("route", "global"):
        fixed = route if text == "route" else ""
        return lambda request: fixed
    client = network_of_client(trusted)
    if text == "client_ip":
        return client
    read = request_key(text) if text != "subject" else lambda request: request.subject.encode("utf-8", "surrogatepass")

    def key(request: Request) -> str:
        value = read(request)
        return _digest(value, salt) if value else client(request)

    return key


def key_named(text: str, value: str, salt: bytes) -> str:
    """The same for a value as a person writes it."""
    if text == "client_ip":
        return network_of(plain(value))
    if text in ("route", "global"):
        return value if text == "route" else ""
    return _digest(value.encode(), salt)


def _digest(value: bytes, salt: bytes) -> str:
    """A value may be long, and a secret that is not to lie about in memory."""
    return blake2b(value, digest_size=16, key=salt).hexdigest()

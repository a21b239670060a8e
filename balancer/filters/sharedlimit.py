"""A limit that several balancers, or several processes of one, hold together, without asking each other on the way.

Each has a part of what a key may still send, and takes from that. Many times a second it says to a ledger what it has
taken, and hears what all have taken, and how many they are: as many parts. A key that it has not asked about lately
may be in use anywhere, so it is shared by all members. So all of them together let through no more than the rate; for
a moment, when several meet a key at once of which they have heard nothing, up to a burst more, or a request each, and
that is owed like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from balancer.filters.limit import BUSY, Limit, LimitOptions

ACTIVE_SECONDS = 1.0  # that a member counts as one that a key is shared with after it has taken something
ROUNDS = 20  # that a key is asked about after it was used last
MOST_CHARGES = 500  # at once; of more keys, others come the next time


class Charge(NamedTuple):
    """What was taken from a key. Nanoseconds: the `price` of a request, and the `most` that a key can owe."""

    limit: str
    key: str
    price: int
    most: int
    taken: int


class Settled(NamedTuple):
    """What a key owes, in nanoseconds, and how many members share it, the one that asks among them."""

    owed: int
    sharing: int


@dataclass(slots=True)
class Use:
    """Of a key lately: how many share it, what was taken since the last charge, rounds without anything."""

    sharing: int
    taken: int = 0
    idle: int = 0


class SharedLimit(Limit):
    """`members` share it. While `is_lost`, there is no ledger to ask, and `on_store_failure` says what holds."""

    def __init__(self, options: LimitOptions) -> None:
        super().__init__(options)
        self._uses: dict[str, Use] = {}
        self._verdict: int | None = None
        self.share(1)

    def share(self, members: int, is_lost: bool = False) -> None:
        """From now on so many, or the last ones that were known of, if the ledger is lost."""
        self.members = members
        if is_lost:
            self._uses.clear()
        self._verdict = {"local": None, "open": 0, "closed": BUSY}[self.options.on_store_failure] if is_lost else None
        if self.options.in_flight is not None:
            self.in_flight = -(-self.options.in_flight // members)

    def wait(self, key: str, now: int) -> int:
        if self._verdict is not None:
            return self._verdict
        self._divide(key)
        return super().wait(key, now)

    def take(self, key: str, now: int) -> bool:
        self._divide(key)
        if self._interval and self._verdict is None:
            self._uses.setdefault(key, Use(self.members)).taken += 1
        return super().take(key, now)

    def _divide(self, key: str) -> None:
        """A part of the rate, and of the burst."""
        use = self._uses.get(key)
        parts = self.members if use is None else use.sharing
        self._price = parts * self._interval
        self._slack = max(self.burst - parts, 0) * self._interval

    def charges(self) -> list[Charge]:
        """What is to be said, and asked, now: of those keys whose turn it is."""
        found, most = [], 2 * (self.burst + self.members) * self._interval
        for key in list(islice(self._uses, MOST_CHARGES)):
            use = self._uses.pop(key)
            use.idle = 0 if use.taken else use.idle + 1
            if use.idle < ROUNDS:
                found.append(Charge(self.options.name, key, self._interval, most, use.taken))
                use.taken = 0
                self._uses[key] = use  # behind the others
        return found

    def settle(self, charge: Charge, settled: Settled, now: int) -> None:
        """What was taken since the charge comes on top."""
        use = self._uses.get(charge.key)
        if use is None:
            return  # the ledger was lost meanwhile
        use.sharing = settled.sharing
        clear = now + settled.owed + use.taken * settled.sharing * self._interval
        if charge.key in self.debts:
            self.debts[charge.key] = clear
        elif settled.owed:
            self.debts.of_another(now)
            self.debts.add(charge.key, clear)

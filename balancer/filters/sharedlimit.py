"""A limit that several balancers, or several processes of one, hold together, without asking each other on the way.

Each has a part of what a key may still send, and takes from that. Many times a second it says to a ledger what it has
taken, and hears what all have taken, and how many they are: as many parts. A key that it has not asked about lately
may be in use anywhere, so it is shared by all members. So all of them together let through no more than the rate; for
a moment, when several meet a key at once of which they have heard nothing, up to a burst more, or a request each, and
that is owed like the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from balancer.filters.debts import STEPS
from balancer.filters.limit import BUSY, SECOND, Limit, LimitOptions

SETTLE_SECONDS = 0.05  # from one round to the next
ACTIVE = SECOND  # that a member counts as one that a key is shared with after it has taken something
KNOWN_AFTER = 3  # rounds: whoever has begun at the same moment has said so by then
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


Settle = Callable[[Sequence[Charge], Sequence[Settled]], None]  # where the ledger's answer goes
Asked = tuple[str, Sequence[Charge], Settle]  # by which process of a member of the cluster


@dataclass(slots=True)
class Use:
    """Of a key lately: how many share it, what was taken since the last charge, rounds since its first and without
    anything."""

    sharing: int
    taken: int = 0
    age: int = 0
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
        use.age += 1
        if use.age >= KNOWN_AFTER:
            use.sharing = settled.sharing
        clear = now + settled.owed + use.taken * use.sharing * self._interval
        if charge.key in self.debts:
            self.debts[charge.key] = clear
        elif settled.owed:
            self.debts.of_another(now)
            self.debts.add(charge.key, clear)


@dataclass(slots=True)
class Account:
    """Of a key: when it owes nothing any more, and when each member took something last."""

    clear: int
    taken_at: dict[Hashable, int]


class Accounts:
    """The ledger of several processes of one balancer, as cluster/link has it for several balancers. Not locked."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, str], Account] = {}

    def charge(self, member: Hashable, charges: Iterable[Charge], now: int) -> list[Settled]:
        return [self._charge(member, each, now) for each in charges]

    def _charge(self, member: Hashable, charge: Charge, now: int) -> Settled:
        self._tidy(now)
        account = self._accounts.pop((charge.limit, charge.key), None) or Account(now, {})
        self._accounts[charge.limit, charge.key] = account  # behind the others
        account.clear = min(max(account.clear, now) + charge.price * charge.taken, now + charge.most)
        if charge.taken:
            account.taken_at[member] = now
        account.taken_at = {each: at for each, at in account.taken_at.items() if at > now - ACTIVE}
        return Settled(account.clear - now, len(account.taken_at.keys() | {member}))

    def _tidy(self, now: int) -> None:
        """Forget who owes nothing and was not used lately, of those that nobody has asked about for the longest."""
        for key, account in list(islice(self._accounts.items(), STEPS)):
            del self._accounts[key]
            if account.clear > now or any(at > now - ACTIVE for at in account.taken_at.values()):
                self._accounts[key] = account

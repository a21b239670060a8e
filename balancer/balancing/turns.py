"""Smooth weighted round robin, the turn-taking of every strategy that takes turns."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

from balancer.balancing.backends import Backend
from balancer.protocol.request import Request

DIGITS = 9  # of what one is owed, in turns, that are kept when the candidates change
EQUAL = 1e-6  # of a turn: what two are owed is the same if it differs by less
FORGOTTEN = 1000  # that are no candidates any more: if there are more, what they are owed is forgotten

# What one has had, in turns; its place among the candidates; itself.
Member = tuple[float, int, Backend]


class SmoothTurns:
    """Each turn every candidate is owed its share of it more; who is owed most goes, and is owed one less.

    Over sum(weights) turns each gets exactly its weight, spread as evenly as possible. What is owed is kept, whatever
    changes: candidates that are away are owed neither more nor less meanwhile, other weights count from the next turn.

    Those of one weight are owed the same for every turn, and differ only in what they have had. So a heap for each
    weight has the one that is owed most, and a turn asks one of each weight instead of all.
    """

    def __init__(self) -> None:
        self._owed: dict[Backend, float] = {}  # to those that are away
        self._members: dict[int, list[Member]] = {}  # by weight
        self._next: list[Member] = []  # those of the weight whose turn it is
        self._places: dict[Backend, int] = {}
        self._total = 0  # weight of all members
        self._before = 0.0  # turns for each unit of weight until the total changed
        self._turns = 0  # since then

    @staticmethod
    def weigh(backend: Backend) -> int:
        return backend.weight

    def gather(self, candidates: Sequence[Backend]) -> None:
        """Those who take turns from now on."""
        rounds = self._rounds()
        for weight, members in self._members.items():
            self._owed.update((backend, round(weight * rounds - had, DIGITS)) for had, _, backend in members)
        self._places = {backend: place for place, backend in enumerate(candidates)}
        self._members, self._total, self._before, self._turns = {}, 0, 0.0, 0
        for backend, place in self._places.items():
            weight = self.weigh(backend)
            self._members.setdefault(weight, []).append((-self._owed.pop(backend, 0.0), place, backend))
            self._total += weight
        if len(self._owed) > FORGOTTEN:
            self._owed = {}
        for members in self._members.values():
            heapify(members)

    def choose(self, request: Request) -> Backend | None:
        """Whose turn it is, until it has been `taken`; None if everybody is away."""
        if len(self._members) == 1:
            [self._next] = self._members.values()
            return self._next[0][2]
        if not self._members:
            return None
        rounds = self._before + (self._turns + 1) / self._total
        most, first = -inf, 0
        for weight, members in self._members.items():
            had, place, _ = members[0]
            owed = weight * rounds - had
            if owed > most + EQUAL or (owed > most - EQUAL and place < first):
                most, first, self._next = owed, place, members
        return self._next[0][2]

    def taken(self, backend: Backend) -> None:
        """Who was chosen has had its turn."""
        had, place, _ = self._next[0]
        heapreplace(self._next, (had + 1, place, backend))
        self._turns += 1

    def leave(self, backend: Backend) -> None:
        """Who was chosen is away until it has `changed`."""
        weight, (had, _, _) = self.weigh(backend), heappop(self._next)
        if not self._next:
            del self._members[weight]
        self._owed[backend] = weight * self._rounds() - had
        self._change_total(-weight)

    def changed(self, backend: Backend) -> None:
        """One of the candidates that was away takes turns again."""
        if backend in self._owed and backend in self._places:
            weight = self.weigh(backend)
            self._change_total(weight)
            had = weight * self._rounds() - self._owed.pop(backend)
            heappush(self._members.setdefault(weight, []), (had, self._places[backend], backend))

    def _rounds(self) -> float:
        """How many turns each unit of weight has been owed since they gathered."""
        return self._before + self._turns / self._total if self._total else self._before

    def _change_total(self, more: int) -> None:
        self._before = self._rounds()
        self._total += more
        self._turns = 0

"""One route, several pools: which of them gets a request. Requests of one key stay together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from balancer.protocol.requestkey import Key

if TYPE_CHECKING:
    from balancer.forwarding.route import Route
    from balancer.protocol.request import Request


class Split:
    """A key is a point from 0 to 1, and each pool has a part of that line, in its order. So when the last one's share
    grows, whoever is there stays there. Requests without a key go anywhere.

    `shares` are asked for with each request, and add up to 1.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        shares: Callable[[], Sequence[float]],
        key: Key,
        rng: random.Random | None = None,
    ) -> None:
        self._routes, self._shares, self._key = routes, shares, key
        self._rng = rng or random.Random()

    def find(self, request: Request) -> Route:
        key = self._key(request)
        point = place(key) if key else self._rng.random()
        for route, share in zip(self._routes, self._shares(), strict=True):
            point -= share
            if point < 0:
                return route
        return self._routes[-1]  # the shares are a rounding short of 1


def place(key: bytes) -> float:
    """Where on the line from 0 to 1; the same everywhere."""
    return int.from_bytes(blake2b(key, digest_size=8).digest()) / 2**64

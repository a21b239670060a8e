"""One route, several pools: which of them gets a request. Requests of one key stay together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from balancer.forwarding.route import Route, Routes
from balancer.protocol.request import Request
from balancer.protocol.requestkey import Key


@dataclass(frozen=True, slots=True)
class Split(Routes):
    """A key is a point from 0 to 1, and each of the `sides` has a part of that line, in their order. So when the share
    of the last one grows, whoever is there stays there. Requests without a key go anywhere.

    `shares` are asked for with each request, and add up to 1.
    """

    sides: Sequence[Routes]
    shares: Callable[[], Sequence[float]]
    key: Key
    rng: random.Random = field(default_factory=random.Random)

    def find(self, request: Request) -> Route:
        key = self.key(request)
        point = place(key) if key else self.rng.random()
        for side, share in zip(self.sides, self.shares(), strict=True):
            point -= share
            if point < 0:
                return side.find(request)
        return self.sides[-1].find(request)  # the shares are a rounding short of 1


def place(key: bytes) -> float:
    """Where on the line from 0 to 1; the same everywhere."""
    return int.from_bytes(blake2b(key, digest_size=8).digest()) / 2**64
